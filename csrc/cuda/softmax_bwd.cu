// dx of softmax and log_softmax from the result alone, rows as the forward has them; what the
// mask's gradient needs of them is kept, or is that gradient where no row shares a row of the mask.
#include "cuda/softmax.h"
#include "cuda/softmax_mask.h"

namespace fasttx {
namespace {

__global__ void __launch_bounds__(512) softmax_bwd(const __grid_constant__ Softmax p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_softmax& a = p.a;
  const int64_t own = row_of_group(p.group), m = own < p.rows ? own : 0;
  const RowIndex at = row_index(p, m);
  const int step = p.group.lanes * 8, first = lane_of_group(p.group) * 8;
  const int N = own < p.rows ? p.N : 0, dtype = a.out.dtype;
  const auto* y_row = static_cast<const uint16_t*>(a.out.data) + row_of(a.out, at);
  const auto* dy_row = static_cast<const uint16_t*>(a.dout.data) + row_of(a.dout, at);

  Words y[CHUNKS], dy[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (first + c * step < N) {
      y[c] = load16_once(y_row + first + c * step);
      dy[c] = load16_once(dy_row + first + c * step);
    }
  float sum[1] = {0.0f}, u[8], v[8];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    if (first + c * step >= N) continue;
    unpack8(y[c], dtype, u);
    unpack8(dy[c], dtype, v);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[0] += weighted(u[i], v[i], a.log);
  }
  row_sum(p.group, sum, scratch);
  float total[1] = {0.0f};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = first + c * step;
    if (n >= N) continue;
    unpack8(y[c], dtype, u);
    unpack8(dy[c], dtype, v);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      v[i] = gradient(u[i], v[i], sum[0], a.log);
      total[0] += v[i];
    }
    if (p.direct)
      store8(a.dmask.data, a.dmask.dtype, row_of(a.dmask, at) + n, v);
    if (!a.dx.data) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= p.scale;
    store16(static_cast<uint16_t*>(a.dx.data) + row_of(a.dx, at) + n, pack8(v, dtype));
  }
  if (!p.sums) return;
  row_sum(p.group, total, scratch);
  if (N && first == 0) {
    store(p.sums + m, sum[0]);
    store(p.totals + m, total[0]);
  }
}

// One row of any width, strides and dtype of the result. Staged, result and upstream gradient lie
// in shared memory: numbers i of all vectors of eight side by side.
__global__ void __launch_bounds__(512, 2) softmax_bwd_any(const __grid_constant__ Softmax p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_softmax& a = p.a;
  const int64_t m = blockIdx.x;
  const RowIndex at = row_index(p, m);
  const int64_t y_row = row_of(a.out, at), dy_row = row_of(a.dout, at), dx_row = row_of(a.dx, at);
  const int64_t dmask_row = row_of(a.dmask, at);
  float *y_stage = scratch + 32, *dy_stage = y_stage + p.N;
  auto y_at = [&](int n) {
    return load1(a.out.data, a.out.dtype, y_row + n * a.out.strides[3]);
  };
  auto dy_at = [&](int n) {
    return load1(a.dout.data, a.dout.dtype, dy_row + n * a.dout.strides[3]);
  };
  // Vectors begin where the result's lie at multiples of 16 bytes; the others' may lie elsewhere.
  const int bytes = a.out.dtype == FASTTX_F32 ? 4 : 2, dx_bytes = 2;
  auto address = [](const fasttx_tensor& t, int64_t at, int size) {
    return reinterpret_cast<uintptr_t>(t.data) + at * size;
  };
  const int lead =
      min(p.N, static_cast<int>((16 - address(a.out, y_row, bytes) % 16) % 16 / bytes));
  const bool by_eight =
      a.out.strides[3] == 1 && a.dout.strides[3] == 1 &&
      (address(a.out, y_row, bytes) ^ address(a.dout, dy_row, bytes)) % 16 == 0;
  const bool dx_by_eight = by_eight && a.dx.data && a.dx.strides[3] == 1 &&
                           address(a.dx, dx_row + lead, dx_bytes) % 16 == 0;
  const int vectors = by_eight ? (p.N - lead) / 8 : 0;
  auto single = [&](int i) { return !by_eight || i < lead ? i : i + 8 * vectors; };
  const int singles = p.N - 8 * vectors;

  constexpr int IN_FLIGHT = 2;
  float sum[1] = {0.0f};
  for (int first = threadIdx.x; first < vectors; first += IN_FLIGHT * blockDim.x) {
    Bits8 y[IN_FLIGHT], dy[IN_FLIGHT];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      const int v = first + k * static_cast<int>(blockDim.x);
      if (v < vectors) {
        y[k] = load8(a.out.data, a.out.dtype, y_row + lead + v * 8);
        dy[k] = load8(a.dout.data, a.dout.dtype, dy_row + lead + v * 8);
      }
    }
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      const int v = first + k * static_cast<int>(blockDim.x);
      if (v >= vectors) continue;
      float u[8], w[8];
      unpack8(y[k], a.out.dtype, u);
      unpack8(dy[k], a.dout.dtype, w);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sum[0] += weighted(u[i], w[i], a.log);
        if (p.staged) {
          y_stage[i * vectors + v] = u[i];
          dy_stage[i * vectors + v] = w[i];
        }
      }
    }
  }
  for (int i = threadIdx.x; i < singles; i += blockDim.x) {
    const float u = y_at(single(i)), w = dy_at(single(i));
    sum[0] += weighted(u, w, a.log);
    if (p.staged) {
      y_stage[8 * vectors + i] = u;
      dy_stage[8 * vectors + i] = w;
    }
  }
  block_sum(sum, scratch);

  // The same thread has the same numbers again.
  float total[1] = {0.0f};
  auto write = [&](int n, float d) {
    total[0] += d;
    if (p.direct) store1(a.dmask.data, a.dmask.dtype, dmask_row + n * a.dmask.strides[3], d);
  };
  auto write_dx = [&](int n, float d) {
    if (a.dx.data) store1(a.dx.data, a.dx.dtype, dx_row + n * a.dx.strides[3], d * p.scale);
  };
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    float u[8], w[8];
    const int n = lead + v * 8;
    if (p.staged) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        u[i] = y_stage[i * vectors + v];
        w[i] = dy_stage[i * vectors + v];
      }
    } else {
      unpack8(load8(a.out.data, a.out.dtype, y_row + n), a.out.dtype, u);
      unpack8(load8(a.dout.data, a.dout.dtype, dy_row + n), a.dout.dtype, w);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      w[i] = gradient(u[i], w[i], sum[0], a.log);
      write(n + i, w[i]);
    }
    if (dx_by_eight) {
#pragma unroll
      for (int i = 0; i < 8; i++) w[i] *= p.scale;
      store8(a.dx.data, a.dx.dtype, dx_row + n, w);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) write_dx(n + i, w[i]);
    }
  }
  for (int i = threadIdx.x; i < singles; i += blockDim.x) {
    const int n = single(i);
    const float u = p.staged ? y_stage[8 * vectors + i] : y_at(n);
    const float w = p.staged ? dy_stage[8 * vectors + i] : dy_at(n);
    const float d = gradient(u, w, sum[0], a.log);
    write(n, d);
    write_dx(n, d);
  }
  if (!p.sums) return;
  block_sum(total, scratch);
  if (threadIdx.x == 0) {
    store(p.sums + m, sum[0]);
    store(p.totals + m, total[0]);
  }
}

// 64 rows that lie side by side: eight a thread, by 32 columns at once.
__global__ void __launch_bounds__(256, 2) softmax_bwd_tile(const __grid_constant__ Softmax p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  Words* stage = reinterpret_cast<Words*>(shared + TILE_COLUMNS * TILE_ROWS * 4);
  const fasttx_softmax& a = p.a;
  const int64_t tiles = (a.x.sizes[2] + TILE_ROWS - 1) / TILE_ROWS;
  RowIndex at = row_index(blockIdx.x, a.x.sizes[1], tiles);
  at.i[2] = at.i[2] * TILE_ROWS + threadIdx.x % 8 * 8;
  const bool live = at.i[2] < a.x.sizes[2];
  const int slot = threadIdx.x / 8;
  const auto* y_column = static_cast<const uint16_t*>(a.out.data) + row_of(a.out, at);
  const auto* dy_column = static_cast<const uint16_t*>(a.dout.data) + row_of(a.dout, at);

  constexpr int IN_FLIGHT = 2;
  float sum[8] = {}, u[8], v[8];
  for (int first = slot; live && first < p.N; first += IN_FLIGHT * TILE_COLUMNS) {
    Words y[IN_FLIGHT], dy[IN_FLIGHT];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      const int n = first + k * TILE_COLUMNS;
      if (n < p.N) {
        y[k] = load16_once(y_column + n * a.out.strides[3]);
        dy[k] = load16_once(dy_column + n * a.dout.strides[3]);
      }
    }
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      const int n = first + k * TILE_COLUMNS;
      if (n >= p.N) continue;
      if (p.staged) {
        stage[n * 16 + threadIdx.x % 8] = y[k];
        stage[n * 16 + 8 + threadIdx.x % 8] = dy[k];
      }
      unpack8(y[k], a.out.dtype, u);
      unpack8(dy[k], a.out.dtype, v);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += weighted(u[i], v[i], a.log);
    }
  }
  tile_join(sum, scratch, [](float x, float y) { return x + y; });
  float total[8] = {};
  for (int n = slot; live && n < p.N; n += TILE_COLUMNS) {
    if (p.staged) {
      unpack8(stage[n * 16 + threadIdx.x % 8], a.out.dtype, u);
      unpack8(stage[n * 16 + 8 + threadIdx.x % 8], a.out.dtype, v);
    } else {
      unpack8(load16_once(y_column + n * a.out.strides[3]), a.out.dtype, u);
      unpack8(load16_once(dy_column + n * a.dout.strides[3]), a.out.dtype, v);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      v[i] = gradient(u[i], v[i], sum[i], a.log);
      total[i] += v[i];
      if (p.direct)
        store1(a.dmask.data, a.dmask.dtype,
               row_of(a.dmask, at) + i * a.dmask.strides[2] + n * a.dmask.strides[3], v[i]);
    }
    if (!a.dx.data) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= p.scale;
    store16(static_cast<uint16_t*>(a.dx.data) + row_of(a.dx, at) + n * a.dx.strides[3],
            pack8(v, a.out.dtype));
  }
  if (!p.sums) return;
  tile_join(total, scratch, [](float x, float y) { return x + y; });
  if (!live || slot) return;
  const int64_t m = (at.i[0] * a.x.sizes[1] + at.i[1]) * a.x.sizes[2] + at.i[2];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    store(p.sums + m + i, sum[i]);
    store(p.totals + m + i, total[i]);
  }
}

int rows(Softmax p, void* stream) {
  const fasttx_softmax& a = p.a;
  bool alike = a.out.dtype == a.x.dtype, columns = alike, tile = alike && p.N > 1;
  for (const fasttx_tensor* t : {&a.out, &a.dout, &a.dx}) {
    columns &= columns_by_eight(*t);
    tile &= rows_by_eight(*t);
  }
  if (p.direct) columns &= columns_by_eight(a.dmask);
  if (columns && p.N % 8 == 0 && p.N <= ROW_COLUMNS)
    return launch(softmax_bwd, blocks_of(p.group, p.rows), threads_of(p.group), ROW_SCRATCH, stream,
                  p);
  if (tile) {
    const size_t scratch = TILE_COLUMNS * TILE_ROWS * 4, both = size_t{TILE_ROWS} * 4 * p.N;
    p.staged = scratch + both <= SOFTMAX_SHARED;
    const int64_t tiles = (a.x.sizes[2] + TILE_ROWS - 1) / TILE_ROWS;
    return launch(softmax_bwd_tile,
                  dim3(static_cast<unsigned>(a.x.sizes[0] * a.x.sizes[1] * tiles)), 256,
                  scratch + (p.staged ? both : 0), stream, p);
  }
  const size_t both = size_t(p.N) * 8;
  p.staged = 128 + both <= SOFTMAX_SHARED;
  const int threads = p.N <= 1024 ? 64 : p.N <= 4096 ? 128 : 512;
  return launch(softmax_bwd_any, dim3(static_cast<unsigned>(p.rows)), threads,
                128 + (p.staged ? both : 0), stream, p);
}

}  // namespace
}  // namespace fasttx

FASTTX_API int64_t fasttx_cuda_softmax_bwd_workspace(const fasttx_softmax& a) {
  using namespace fasttx;
  if (!a.dmask.data) return 0;
  const MaskPlan made = mask_plan(a);
  return made.direct ? 0 : 2 * softmax_arguments(a).rows + made.units * made.parts * made.columns;
}

// A cudaError_t.
FASTTX_API int fasttx_cuda_softmax_bwd(const fasttx_softmax& a, float* workspace, void* stream) {
  using namespace fasttx;
  Softmax p = softmax_arguments(a);
  const bool some = p.rows && p.N;
  MaskPlan made = {};
  if (a.dmask.data) {
    made = mask_plan(a);
    p.direct = made.direct;
    if (!p.direct) {
      p.sums = workspace;
      p.totals = workspace + p.rows;
    }
  }
  int status = some ? rows(p, stream) : 0;
  if (!status && a.dmask.data && !p.direct)
    status = softmax_mask_gradient(p, made, workspace + 2 * p.rows, stream);
  return status;
}
