// The gradients of add_norm. A block has a part of the rows; its warps (to 256 columns) or all of
// its threads together (to 4096) go through them one by one, each read once, and keep the sums for
// the parameters in registers. Others, and odd strides, by a kernel for the rows and one for the
// columns. What the parts have summed is added in order.
#include "cuda/add_norm.h"

namespace fasttx {
namespace {

__global__ void __launch_bounds__(512) add_norm_bwd(const __grid_constant__ AddNorm p) {
  FASTTX_SHARED(shared);
  const fasttx_add_norm& a = p.a;
  float* scratch = reinterpret_cast<float*>(shared);
  const int thread = lane_of_group(p.group);
  const int64_t first = blockIdx.x * p.part_rows, last = min(first + p.part_rows, a.M);
  const Key key = load_key(p.dropout);
  const float per_column = 1.0f / a.N;
  const int n = thread * 8;
  const bool live = n < a.N;
  float sums[3][8] = {};

  for (int64_t m = first + (threadIdx.x >> p.group.shift); m < last; m += p.group.rows) {
    Words x;
    Bits8 residual, upstream, straight;
    if (live) {
      x = load16_once(static_cast<const uint16_t*>(a.x.data) + row_offset(a.x, m) + n);
      if (a.dout.data) upstream = load8(a.dout.data, a.dout.dtype, row_offset(a.dout, m) + n);
      if (a.residual.data)
        residual = load8(a.residual.data, a.residual.dtype, row_offset(a.residual, m) + n);
      if (a.dtotal.data)
        straight = load8(a.dtotal.data, a.dtotal.dtype, row_offset(a.dtotal, m) + n);
    }
    const float mean = a.rms ? 0.0f : load(a.mean + m), rstd = load(a.rstd + m);

    float xhat[8] = {}, g[8] = {}, means[2] = {0.0f, 0.0f};
    uint32_t kept = 0;
    if (live) {
      if (p.dropout.threshold) kept = keep_bits(p.dropout, key, thread, static_cast<uint32_t>(m));
      unpack8(x, a.x.dtype, xhat);
      add_eight(p, xhat, residual, kept, n);
#pragma unroll
      for (int i = 0; i < 8; i++) xhat[i] = (xhat[i] - mean) * rstd;
      if (a.dout.data) unpack8(upstream, a.dout.dtype, g);
      if (p.partials) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          sums[0][i] += g[i] * xhat[i];
          sums[1][i] += g[i];
        }
      }
      weigh(a.weight, n, g);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        means[0] += g[i];
        means[1] += g[i] * xhat[i];
      }
    }
    row_sum(p.group, means, scratch);
    if (!live) continue;
    const float along = a.rms ? 0.0f : means[0] * per_column, across = means[1] * per_column;
    float dz[8];
#pragma unroll
    for (int i = 0; i < 8; i++) dz[i] = (g[i] - along - xhat[i] * across) * rstd;
    if (a.dtotal.data) {
      unpack8(straight, a.dtotal.dtype, g);
#pragma unroll
      for (int i = 0; i < 8; i++) dz[i] += g[i];
    }
    if (a.need & 2) store8(a.dresidual.data, a.dresidual.dtype, row_offset(a.dresidual, m) + n, dz);
    if (p.dropout.threshold) drop(p.dropout, kept, dz);
    if (a.need & 1)
      store16(static_cast<uint16_t*>(a.dx.data) + row_offset(a.dx, m) + n, pack8(dz, a.x.dtype));
    if (p.partials) {
#pragma unroll
      for (int i = 0; i < 8; i++) sums[2][i] += dz[i];
    }
  }
  if (p.partials) store_part(p.group, sums, a.need >> 2, p.partials, a.N, n, scratch);
}

// dx and dresidual of a row, and its two means for the columns.
__global__ void __launch_bounds__(256) add_norm_bwd_rows(const __grid_constant__ AddNorm p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_add_norm& a = p.a;
  const Key key = load_key(p.dropout);
  const int64_t m = blockIdx.x, x_row = row_offset(a.x, m),
                residual_row = row_offset(a.residual, m);
  const int64_t dout_row = row_offset(a.dout, m), dtotal_row = row_offset(a.dtotal, m);
  const int64_t dx_row = row_offset(a.dx, m), dresidual_row = row_offset(a.dresidual, m);
  const float mean = a.rms ? 0.0f : a.mean[m], rstd = a.rstd[m];
  auto xhat = [&](int64_t n) { return (add_one(p, key, m, x_row, residual_row, n) - mean) * rstd; };
  auto gw = [&](int64_t n) {
    if (!a.dout.data) return 0.0f;
    const float g = load1(a.dout.data, a.dout.dtype, dout_row + n * a.dout.column);
    return a.weight.data ? g * load1(a.weight.data, a.weight.dtype, n * a.weight.column) : g;
  };
  const float2 means = row_means(gw, xhat, a.N, !a.rms, scratch);
  const float along = means.x, across = means.y;
  if (p.means && threadIdx.x == 0) {
    p.means[m] = along;
    p.means[a.M + m] = across;
  }
  for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) {
    float dz = (gw(n) - along - xhat(n) * across) * rstd;
    if (a.dtotal.data) dz += load1(a.dtotal.data, a.dtotal.dtype, dtotal_row + n * a.dtotal.column);
    if (a.need & 2)
      store1(a.dresidual.data, a.dresidual.dtype, dresidual_row + n * a.dresidual.column, dz);
    if (a.need & 1)
      store1(a.dx.data, a.dx.dtype, dx_row + n * a.dx.column, drop(p.dropout, key, m, n, dz));
  }
}

// The sums of 32 columns over the rows of a part, by 8 rows at once.
__global__ void __launch_bounds__(256) add_norm_bwd_columns(const __grid_constant__ AddNorm p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_add_norm& a = p.a;
  const Key key = load_key(p.dropout);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = int64_t{blockIdx.x} * 32 + lane;
  const int64_t first = blockIdx.y * p.part_rows, last = min(first + p.part_rows, a.M);
  float sums[3] = {0.0f, 0.0f, 0.0f};
  if (n < a.N)
    for (int64_t m = first + warp; m < last; m += 8) {
      const float mean = a.rms ? 0.0f : a.mean[m], rstd = a.rstd[m];
      const float z = add_one(p, key, m, row_offset(a.x, m), row_offset(a.residual, m), n);
      const float xhat = (z - mean) * rstd;
      const float g =
          a.dout.data ? load1(a.dout.data, a.dout.dtype, row_offset(a.dout, m) + n * a.dout.column)
                      : 0.0f;
      sums[0] += g * xhat;
      sums[1] += g;
      if (!(a.need & 16)) continue;
      const float gw =
          a.weight.data ? g * load1(a.weight.data, a.weight.dtype, n * a.weight.column) : g;
      float dz = (gw - p.means[m] - xhat * p.means[a.M + m]) * rstd;
      if (a.dtotal.data)
        dz += load1(a.dtotal.data, a.dtotal.dtype, row_offset(a.dtotal, m) + n * a.dtotal.column);
      sums[2] += drop(p.dropout, key, m, n, dz);
    }
  store_part(sums, a.need >> 2, p.partials, a.N, n, scratch);
}

Parts plan(const fasttx_add_norm& a) {
  bool even = a.N % 8 == 0 && a.N > 0 && a.N <= 4096 && a.x.dtype != FASTTX_F32;
  for (const fasttx_rows* r :
       {&a.x, &a.residual, &a.weight, &a.x_bias, &a.dout, &a.dtotal, &a.dx, &a.dresidual})
    even &= by_eight(*r);
  return parts_of(a.M, a.N, even);
}

}  // namespace
}  // namespace fasttx

FASTTX_API int64_t fasttx_cuda_add_norm_bwd_workspace(const fasttx_add_norm& a) {
  const fasttx::Parts made = fasttx::plan(a);
  return (a.need & 28 ? made.count * 3 * a.N : 0) + (a.need & 16 ? 2 * a.M : 0);
}

FASTTX_API int fasttx_cuda_add_norm_bwd(const fasttx_add_norm& a, float* workspace, void* stream) {
  using namespace fasttx;
  if (a.N == 0) return 0;
  const Parts made = plan(a);
  AddNorm p = {a,         make_dropout(a.dropout_p, a.seed), nullptr,   nullptr,
               made.rows, static_cast<int>(made.count),      made.group};
  if (a.need & 28) p.partials = workspace;
  if (a.need & 16) p.means = workspace + made.count * 3 * a.N;
  const unsigned blocks = static_cast<unsigned>((a.N + 31) / 32);
  int status = 0;
  if (a.M && made.even) {
    status = launch(add_norm_bwd, dim3(static_cast<unsigned>(p.parts)), threads_of(p.group),
                    part_scratch(p.group), stream, p);
  } else if (a.M) {
    if (a.need & (1 | 2 | 16))
      status = launch(add_norm_bwd_rows, dim3(static_cast<unsigned>(a.M)), 256, 256, stream, p);
    if (!status && a.need & 28)
      status = launch(add_norm_bwd_columns, dim3(blocks, p.parts), 256, 3 * 8 * 32 * 4, stream, p);
  }
  if (!status && a.need & 28)
    status = add_parts(p.partials, a.N, p.parts, a.need & 4 ? a.dweight : fasttx_rows{},
                       a.need & 8 ? a.dbias : fasttx_rows{},
                       a.need & 16 ? a.dx_bias : fasttx_rows{}, stream);
  return status;
}
