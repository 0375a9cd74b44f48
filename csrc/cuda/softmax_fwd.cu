// softmax(scale * x + mask) and its logarithm. Rows of up to 16384 columns in registers between one
// read and one write (row_group.h); of other widths, alignments and strides by a block that sweeps
// twice, with the logits in shared memory where they fit; where rows lie side by side (a dimension
// other than the last), 64 of them by a block.
#include "cuda/softmax.h"

namespace fasttx {
namespace {

__global__ void __launch_bounds__(512, 1) softmax_fwd(const __grid_constant__ Softmax p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_softmax& a = p.a;
  const int64_t own = row_of_group(p.group);
  const bool live = own < p.rows;
  const RowIndex at = row_index(p, live ? own : 0);
  const int step = p.group.lanes * 8, first = lane_of_group(p.group) * 8;
  const int end = live ? visible_columns(p, at) : 0, N = live ? p.N : 0;
  const uint16_t* row = static_cast<const uint16_t*>(a.x.data) + row_of(a.x, at);

  Words x[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (first + c * step < end) x[c] = load16_once(row + first + c * step);
  const int64_t mask_row = row_of(a.mask, at);
  float z[CHUNKS][8], peak = -INFINITY;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = first + c * step;
#pragma unroll
    for (int i = 0; i < 8; i++) z[c][i] = -INFINITY;
    if (n >= end) continue;
    unpack8(x[c], a.x.dtype, z[c]);
#pragma unroll
    for (int i = 0; i < 8; i++) z[c][i] *= p.scale;
    if (a.mask.data) masked(a.mask, mask_row, n, z[c]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (n + i >= end) z[c][i] = -INFINITY;
      peak = fmaxf(peak, z[c][i]);
    }
  }
  peak = finite_peak(row_max(p.group, peak, scratch));
  float sum[1] = {0.0f};
  uint32_t hidden = 0;  // a bit a number
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    if (first + c * step >= N) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (z[c][i] == -INFINITY) {
        hidden |= 1u << (c * 8 + i);
        continue;
      }
      const float e = exponential(z[c][i], peak);
      sum[0] += e;
      if (!a.log) z[c][i] = e;
    }
  }
  row_sum(p.group, sum, scratch);
  const RowScale by = row_scale(peak, sum[0]);
  const int64_t out = row_of(a.out, at);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = first + c * step;
    if (n >= N) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (a.log)
        z[c][i] = result(z[c][i], by, 1);
      else
        z[c][i] = hidden >> (c * 8 + i) & 1 ? 0.0f : z[c][i] * by.inverse;
    }
    store8(a.out.data, a.out.dtype, out + n, z[c]);
  }
}

// One row of any width and strides. Staged, its logits lie in shared memory: numbers i of all
// vectors of eight side by side, so that no two threads meet at a bank.
__global__ void __launch_bounds__(512) softmax_fwd_any(const __grid_constant__ Softmax p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  float* stage = scratch + 32;
  const fasttx_softmax& a = p.a;
  const RowIndex at = row_index(p, blockIdx.x);
  const int end = visible_columns(p, at), vectors = p.N / 8 + 1;
  const int64_t stride = a.x.strides[3], mask_row = row_of(a.mask, at);
  const uint16_t* row = static_cast<const uint16_t*>(a.x.data) + row_of(a.x, at);
  const bool by_eight = stride == 1;
  const int lead = by_eight ? leading(row) : p.N;
  auto one_at = [&](int n) { return !by_eight ? n : 8 * vectors + (n < lead ? n : 8 + n % 8); };
  auto logits = [&](int n, float (&z)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] *= p.scale;
    if (a.mask.data) masked(a.mask, mask_row, n, z);
  };
  auto logit = [&](int n, float x) {
    const float z = x * p.scale;
    return a.mask.data ? masked(a.mask, mask_row, n, z) : z;
  };

  float peak = -INFINITY, sum[1] = {0.0f};
  sweep<4>(
      row, a.x.dtype, stride, end, by_eight,
      [&](int n, const float(&x)[8]) {
        float z[8], largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < 8; i++) z[i] = x[i];
        logits(n, z);
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, z[i]);
        raise(largest, peak, sum[0]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          sum[0] += z[i] == -INFINITY ? 0.0f : exponential(z[i], finite_peak(peak));
          if (p.staged) stage[i * vectors + n / 8] = z[i];
        }
      },
      [&](int n, float x) {
        const float z = logit(n, x);
        raise(z, peak, sum[0]);
        sum[0] += z == -INFINITY ? 0.0f : exponential(z, finite_peak(peak));
        if (p.staged) stage[one_at(n)] = z;
      });
  const float own = peak;
  peak = finite_peak(block_max(peak, scratch));
  if (own != -INFINITY) sum[0] *= exponential(own, peak);
  block_sum(sum, scratch);
  const RowScale by = row_scale(peak, sum[0]);

  // The same thread has the same numbers again.
  const int64_t out = row_of(a.out, at), out_stride = a.out.strides[3];
  const int bytes = a.out.dtype == FASTTX_F32 ? 4 : 2;
  const char* to = static_cast<const char*>(a.out.data) + out * bytes;
  auto write = [&](int n, float (&z)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] = result(z[i], by, a.log);
    if (out_stride == 1 && reinterpret_cast<uintptr_t>(to + n * bytes) % 16 == 0) {
      store8(a.out.data, a.out.dtype, out + n, z);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        store1(a.out.data, a.out.dtype, out + (n + i) * out_stride, z[i]);
    }
  };
  auto write_one = [&](int n, float z) {
    store1(a.out.data, a.out.dtype, out + n * out_stride, result(z, by, a.log));
  };
  if (p.staged) {
    const int first = by_eight ? min(end, lead) : end;
    const int whole = by_eight ? (end - first) / 8 : 0;
    for (int v = threadIdx.x; v < whole; v += blockDim.x) {
      const int n = first + 8 * v;
      float z[8];
#pragma unroll
      for (int i = 0; i < 8; i++) z[i] = stage[i * vectors + n / 8];
      write(n, z);
    }
    for (int i = threadIdx.x; i < end - 8 * whole; i += blockDim.x) {
      const int n = i < first ? i : i + 8 * whole;
      write_one(n, stage[one_at(n)]);
    }
  } else {
    sweep<4>(
        row, a.x.dtype, stride, end, by_eight,
        [&](int n, const float(&x)[8]) {
          float z[8];
#pragma unroll
          for (int i = 0; i < 8; i++) z[i] = x[i];
          logits(n, z);
          write(n, z);
        },
        [&](int n, float x) { write_one(n, logit(n, x)); });
  }
  for (int n = end + threadIdx.x; n < p.N; n += blockDim.x) write_one(n, -INFINITY);
}

// 64 rows that lie side by side: eight a thread, by 32 columns at once.
__global__ void __launch_bounds__(256, 2) softmax_fwd_tile(const __grid_constant__ Softmax p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  Words* stage = reinterpret_cast<Words*>(shared + TILE_COLUMNS * TILE_ROWS * 4);
  const fasttx_softmax& a = p.a;
  const int64_t tiles = (a.x.sizes[2] + TILE_ROWS - 1) / TILE_ROWS;
  RowIndex at = row_index(blockIdx.x, a.x.sizes[1], tiles);
  at.i[2] = at.i[2] * TILE_ROWS + threadIdx.x % 8 * 8;
  const bool live = at.i[2] < a.x.sizes[2];
  const int slot = threadIdx.x / 8;
  const uint16_t* column = static_cast<const uint16_t*>(a.x.data) + row_of(a.x, at);
  const int64_t mask_row = row_of(a.mask, at);

  auto logits = [&](int n, Words x, float(&z)[8]) {
    unpack8(x, a.x.dtype, z);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      z[i] *= p.scale;
      if (a.mask.data) z[i] = masked(a.mask, mask_row + i * a.mask.strides[2], n, z[i]);
      if (a.causal && n > at.i[2] + i + p.offset) z[i] = -INFINITY;
    }
  };
  constexpr int IN_FLIGHT = 4;
  float peak[8], sum[8] = {};
#pragma unroll
  for (int i = 0; i < 8; i++) peak[i] = -INFINITY;
  for (int first = slot; live && first < p.N; first += IN_FLIGHT * TILE_COLUMNS) {
    Words x[IN_FLIGHT];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      const int n = first + k * TILE_COLUMNS;
      if (n < p.N) x[k] = load16_once(column + n * a.x.strides[3]);
    }
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      const int n = first + k * TILE_COLUMNS;
      if (n >= p.N) continue;
      if (p.staged) stage[n * 8 + threadIdx.x % 8] = x[k];
      float z[8];
      logits(n, x[k], z);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        raise(z[i], peak[i], sum[i]);
        sum[i] += z[i] == -INFINITY ? 0.0f : exponential(z[i], finite_peak(peak[i]));
      }
    }
  }
  float all[8];
#pragma unroll
  for (int i = 0; i < 8; i++) all[i] = peak[i];
  tile_join(all, scratch, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll
  for (int i = 0; i < 8; i++) {
    all[i] = finite_peak(all[i]);
    if (peak[i] != -INFINITY) sum[i] *= exponential(peak[i], all[i]);
  }
  tile_join(sum, scratch, [](float x, float y) { return x + y; });
  if (!live) return;
  RowScale by[8];
#pragma unroll
  for (int i = 0; i < 8; i++) by[i] = row_scale(all[i], sum[i]);
  const int64_t out = row_of(a.out, at);
  for (int n = slot; n < p.N; n += TILE_COLUMNS) {
    float z[8];
    logits(n, p.staged ? stage[n * 8 + threadIdx.x % 8] : load16_once(column + n * a.x.strides[3]),
           z);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] = result(z[i], by[i], a.log);
    store8(a.out.data, a.out.dtype, out + n * a.out.strides[3], z);
  }
}

int forward(Softmax p, void* stream) {
  const fasttx_softmax& a = p.a;
  if (p.N % 8 == 0 && p.N <= ROW_COLUMNS && columns_by_eight(a.x) && columns_by_eight(a.out))
    return launch(softmax_fwd, blocks_of(p.group, p.rows), threads_of(p.group), ROW_SCRATCH, stream,
                  p);
  if (p.N > 1 && rows_by_eight(a.x) && rows_by_eight(a.out)) {
    const size_t scratch = TILE_COLUMNS * TILE_ROWS * 4, tile = size_t{TILE_ROWS} * 2 * p.N;
    p.staged = scratch + tile <= SOFTMAX_SHARED;
    const int64_t tiles = (a.x.sizes[2] + TILE_ROWS - 1) / TILE_ROWS;
    return launch(softmax_fwd_tile,
                  dim3(static_cast<unsigned>(a.x.sizes[0] * a.x.sizes[1] * tiles)), 256,
                  scratch + (p.staged ? tile : 0), stream, p);
  }
  const size_t row = (size_t(p.N) + 24) * 4;
  p.staged = 128 + row <= SOFTMAX_SHARED;
  const int threads = p.N <= 1024 ? 64 : p.N <= 4096 ? 128 : 512;
  return launch(softmax_fwd_any, dim3(static_cast<unsigned>(p.rows)), threads,
                128 + (p.staged ? row : 0), stream, p);
}

}  // namespace
}  // namespace fasttx

// A cudaError_t.
FASTTX_API int fasttx_cuda_softmax_fwd(const fasttx_softmax& a, void* stream) {
  using namespace fasttx;
  const Softmax p = softmax_arguments(a);
  if (!p.rows || !p.N) return 0;
  return forward(p, stream);
}
