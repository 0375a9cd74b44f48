// out = norm(residual + dropout(x + x_bias)): rows of up to 16384 columns in registers between one
// read and one write (row_group.h); others, and those of odd strides, by a block that reads them
// once a pass.
#include "cuda/add_norm.h"

namespace fasttx {
namespace {

FASTTX_DEVICE void store_moments(const fasttx_add_norm& a, int64_t m, const Moments& by) {
  if (!a.rms) store(a.mean + m, by.mean);
  store(a.rstd + m, by.rstd);
}

__global__ void __launch_bounds__(512) add_norm_fwd(const __grid_constant__ AddNorm p) {
  FASTTX_SHARED(shared);
  const fasttx_add_norm& a = p.a;
  const int64_t own = row_of_group(p.group), m = own < a.M ? own : 0;
  const int N = own < a.M ? static_cast<int>(a.N) : 0;
  const int lane = lane_of_group(p.group), step = p.group.lanes * 8, first = lane * 8;
  const int64_t x_row = row_offset(a.x, m), residual_row = row_offset(a.residual, m);

  Words x[CHUNKS];
  Bits8 residual[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = first + c * step;
    if (n < N) x[c] = load16_once(static_cast<const uint16_t*>(a.x.data) + x_row + n);
  }
  if (a.residual.data) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int n = first + c * step;
      if (n < N) residual[c] = load8(a.residual.data, a.residual.dtype, residual_row + n);
    }
  }

  const Key key = load_key(p.dropout);
  float z[CHUNKS][8];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = first + c * step;
    if (n >= N) continue;
    const uint32_t kept =
        p.dropout.threshold ? keep_bits(p.dropout, key, n / 8, static_cast<uint32_t>(m)) : 0;
    unpack8(x[c], a.x.dtype, z[c]);
    add_eight(p, z[c], residual[c], kept, n);
    if (a.total.data) store8(a.total.data, a.total.dtype, row_offset(a.total, m) + n, z[c]);
  }
  const Moments by =
      row_moments(p.group, z, N, a.N, !a.rms, a.eps, reinterpret_cast<float*>(shared));
  if (N && lane == 0) store_moments(a, m, by);
  const int64_t out_row = row_offset(a.out, m);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = first + c * step;
    if (n >= N) continue;
    normalize(by, a.weight, a.bias, n, z[c]);
    store8(a.out.data, a.out.dtype, out_row + n, z[c]);
  }
}

__global__ void __launch_bounds__(256) add_norm_fwd_any(const __grid_constant__ AddNorm p) {
  FASTTX_SHARED(shared);
  const fasttx_add_norm& a = p.a;
  const int64_t m = blockIdx.x, x_row = row_offset(a.x, m),
                residual_row = row_offset(a.residual, m);
  const Key key = load_key(p.dropout);
  auto z = [&](int64_t n) { return add_one(p, key, m, x_row, residual_row, n); };
  const Moments by = row_moments(z, a.N, !a.rms, a.eps, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) store_moments(a, m, by);
  const int64_t out_row = row_offset(a.out, m), total_row = row_offset(a.total, m);
  for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) {
    const float x = z(n);
    if (a.total.data) store1(a.total.data, a.total.dtype, total_row + n * a.total.column, x);
    store1(a.out.data, a.out.dtype, out_row + n * a.out.column,
           normalize(by, a.weight, a.bias, n, x));
  }
}

}  // namespace
}  // namespace fasttx

FASTTX_API int fasttx_cuda_add_norm_fwd(const fasttx_add_norm& a, void* stream) {
  using namespace fasttx;
  if (a.M == 0) return 0;
  const AddNorm p = {a, make_dropout(a.dropout_p, a.seed), nullptr, nullptr, 0, 0, row_group(a.N)};
  bool even = a.N % 8 == 0 && a.N > 0 && a.N <= ROW_COLUMNS && a.x.dtype != FASTTX_F32;
  for (const fasttx_rows* r : {&a.x, &a.residual, &a.weight, &a.bias, &a.x_bias, &a.out, &a.total})
    even &= by_eight(*r);
  if (even)
    return launch(add_norm_fwd, blocks_of(p.group, a.M), threads_of(p.group), ROW_SCRATCH, stream,
                  p);
  return launch(add_norm_fwd_any, dim3(static_cast<unsigned>(a.M)), 256, 128, stream, p);
}
