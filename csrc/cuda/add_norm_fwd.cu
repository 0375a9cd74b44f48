// out = norm(residual + dropout(x + x_bias)): rows of up to 1024 columns by a warp, of up to 16384
// by a block, kept in registers between one read and one write; others, and those of odd strides,
// by a block that reads them once a pass.
#include "cuda/add_norm.h"

namespace fasttx {
namespace {

constexpr int WARPS = 4;  // of a block whose warps have a row each

template <class T, int CHUNKS, bool WARP>
__global__ void __launch_bounds__(WARP ? 32 * WARPS : 512, WARP ? 4 : 1)
    add_norm_fwd(const __grid_constant__ AddNorm p) {
  FASTTX_SHARED(shared);
  const fasttx_add_norm& a = p.a;
  const int N = static_cast<int>(a.N);
  const int threads = WARP ? 32 : blockDim.x, thread = WARP ? threadIdx.x % 32 : threadIdx.x;
  const int64_t m = WARP ? int64_t{blockIdx.x} * WARPS + threadIdx.x / 32 : blockIdx.x;
  if (WARP && m >= a.M) return;
  float* scratch = reinterpret_cast<float*>(shared);
  const int64_t x_row = row_offset(a.x, m), residual_row = row_offset(a.residual, m);

  Words x[CHUNKS];
  Bits8 residual[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = (c * threads + thread) * 8;
    if (n < N) x[c] = load16_once(static_cast<const T*>(a.x.data) + x_row + n);
  }
  if (a.residual.data) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int n = (c * threads + thread) * 8;
      if (n < N) residual[c] = load8(a.residual.data, a.residual.dtype, residual_row + n);
    }
  }

  const Key key = load_key(p.dropout);
  float z[CHUNKS][8], sum[1] = {0.0f};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = (c * threads + thread) * 8;
    if (n < N) {
      const uint32_t kept = p.dropout.threshold ? keep_bits(p.dropout, key, c * threads + thread,
                                                            static_cast<uint32_t>(m))
                                                : 0;
      unpack8<T>(x[c], z[c]);
      add_eight(p, z[c], residual[c], kept, n);
      if (a.total.data) store8(a.total.data, a.total.dtype, row_offset(a.total, m) + n, z[c]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (n >= N) z[c][i] = 0.0f;
      sum[0] += z[c][i];
    }
  }

  float mean = 0.0f;
  if (!a.rms) {
    if (WARP)
      sum[0] = warp_sum(sum[0]);
    else
      block_sum(sum, scratch);
    mean = sum[0] / a.N;
  }
  float square[1] = {0.0f};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < 8; i++)
      if ((c * threads + thread) * 8 < N) square[0] += (z[c][i] - mean) * (z[c][i] - mean);
  if (WARP)
    square[0] = warp_sum(square[0]);
  else
    block_sum(square, scratch);
  const float rstd = 1.0f / sqrtf(square[0] / a.N + static_cast<float>(a.eps));
  if (thread == 0) {
    if (!a.rms) store(a.mean + m, mean);
    store(a.rstd + m, rstd);
  }

  const int64_t out_row = row_offset(a.out, m);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = (c * threads + thread) * 8;
    if (n >= N) continue;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) z[c][i] = (z[c][i] - mean) * rstd;
    if (a.weight.data) {
      unpack8(load8(a.weight.data, a.weight.dtype, n), a.weight.dtype, v);
#pragma unroll
      for (int i = 0; i < 8; i++) z[c][i] *= v[i];
    }
    if (a.bias.data) {
      unpack8(load8(a.bias.data, a.bias.dtype, n), a.bias.dtype, v);
#pragma unroll
      for (int i = 0; i < 8; i++) z[c][i] += v[i];
    }
    store8(a.out.data, a.out.dtype, out_row + n, z[c]);
  }
}

__global__ void __launch_bounds__(256) add_norm_fwd_any(const __grid_constant__ AddNorm p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_add_norm& a = p.a;
  const int64_t m = blockIdx.x, x_row = row_offset(a.x, m),
                residual_row = row_offset(a.residual, m);
  const Key key = load_key(p.dropout);
  auto z = [&](int64_t n) { return add_one(p, key, m, x_row, residual_row, n); };
  float sum[1] = {0.0f}, square[1] = {0.0f}, mean = 0.0f;
  if (!a.rms) {
    for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) sum[0] += z(n);
    block_sum(sum, scratch);
    mean = a.N ? sum[0] / a.N : 0.0f;
  }
  for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) {
    const float centered = z(n) - mean;
    square[0] += centered * centered;
  }
  block_sum(square, scratch);
  const float rstd = a.N ? 1.0f / sqrtf(square[0] / a.N + static_cast<float>(a.eps)) : 0.0f;
  if (threadIdx.x == 0) {
    if (!a.rms) store(a.mean + m, mean);
    store(a.rstd + m, rstd);
  }
  const int64_t out_row = row_offset(a.out, m), total_row = row_offset(a.total, m);
  for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) {
    const float x = z(n);
    if (a.total.data) store1(a.total.data, a.total.dtype, total_row + n * a.total.column, x);
    float y = (x - mean) * rstd;
    if (a.weight.data) y *= load1(a.weight.data, a.weight.dtype, n * a.weight.column);
    if (a.bias.data) y += load1(a.bias.data, a.bias.dtype, n * a.bias.column);
    store1(a.out.data, a.out.dtype, out_row + n * a.out.column, y);
  }
}

template <class T>
int forward(const AddNorm& p, void* stream) {
  const int64_t N = p.a.N, M = p.a.M;
  const dim3 rows(static_cast<unsigned>(M)), groups(static_cast<unsigned>((M + WARPS - 1) / WARPS));
  if (N <= 256) return launch(add_norm_fwd<T, 1, true>, groups, 32 * WARPS, 0, stream, p);
  if (N <= 512) return launch(add_norm_fwd<T, 2, true>, groups, 32 * WARPS, 0, stream, p);
  if (N <= 768) return launch(add_norm_fwd<T, 3, true>, groups, 32 * WARPS, 0, stream, p);
  if (N <= 1024) return launch(add_norm_fwd<T, 4, true>, groups, 32 * WARPS, 0, stream, p);
  const int threads = static_cast<int>((N + 4 * 8 * 32 - 1) / (4 * 8 * 32) * 32);
  return launch(add_norm_fwd<T, 4, false>, rows, threads, 128, stream, p);
}

}  // namespace
}  // namespace fasttx

FASTTX_API int fasttx_cuda_add_norm_fwd(const fasttx_add_norm& a, void* stream) {
  using namespace fasttx;
  if (a.M == 0) return 0;
  AddNorm p = {a, make_dropout(a.dropout_p, a.seed), nullptr, nullptr, 0, 0};
  bool even = a.N % 8 == 0 && a.N > 0 && a.N <= 16384;
  for (const fasttx_rows* r : {&a.x, &a.residual, &a.weight, &a.bias, &a.x_bias, &a.out, &a.total})
    even &= by_eight(*r);
  if (even && a.x.dtype == FASTTX_BF16) return forward<bf16>(p, stream);
  if (even && a.x.dtype == FASTTX_F16) return forward<f16>(p, stream);
  return launch(add_norm_fwd_any, dim3(static_cast<unsigned>(a.M)), 256, 128, stream, p);
}
