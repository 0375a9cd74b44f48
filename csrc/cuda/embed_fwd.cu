// out = dropout(norm(scale * token + position + segment)): rows of up to 1024 columns by a warp, of
// up to 16384 by a block, kept in registers between one read of each table's row and one write;
// others, and those of odd strides, by a block that reads them once a pass.
#include "cuda/embed.h"

namespace fasttx {
namespace {

constexpr int WARPS = 4;  // of a block whose warps have a row each

template <int CHUNKS, bool WARP>
__global__ void __launch_bounds__(WARP ? 32 * WARPS : 512, WARP ? 4 : 1)
    embed_fwd(const __grid_constant__ Embed p) {
  FASTTX_SHARED(shared);
  const fasttx_embed& a = p.a;
  const int N = static_cast<int>(a.N);
  const int threads = WARP ? 32 : blockDim.x, thread = WARP ? threadIdx.x % 32 : threadIdx.x;
  const int64_t m = WARP ? int64_t{blockIdx.x} * WARPS + threadIdx.x / 32 : blockIdx.x;
  if (WARP && m >= a.M) return;
  float* scratch = reinterpret_cast<float*>(shared);
  const Places at = places(a, m);

  Bits8 token[CHUNKS], position[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = (c * threads + thread) * 8;
    if (n >= N || !at.inside) continue;
    token[c] = load_table(a, FASTTX_TOKEN, at, n);
    if (a.table[FASTTX_POSITION].data) position[c] = load_table(a, FASTTX_POSITION, at, n);
  }
  float z[CHUNKS][8], sum[1] = {0.0f};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = (c * threads + thread) * 8;
    if (n < N) sum_tables(a, at, token[c], position[c], n, z[c]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (n >= N) z[c][i] = 0.0f;
      sum[0] += z[c][i];
    }
  }

  float mean = 0.0f, rstd = 1.0f;
  if (a.norm == 1) {
    if (WARP)
      sum[0] = warp_sum(sum[0]);
    else
      block_sum(sum, scratch);
    mean = sum[0] / a.N;
  }
  if (a.norm) {
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
    rstd = 1.0f / sqrtf(square[0] / a.N + static_cast<float>(a.eps));
    if (thread == 0) {
      if (a.norm == 1) store(a.mean + m, mean);
      store(a.rstd + m, rstd);
    }
  }

  const Key key = load_key(p.dropout);
  const int64_t out = row_offset(a.out, m);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = (c * threads + thread) * 8;
    if (n >= N) continue;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) z[c][i] = (z[c][i] - mean) * rstd;
    if (a.norm_weight.data) {
      unpack8(load8(a.norm_weight.data, a.norm_weight.dtype, n), a.norm_weight.dtype, v);
#pragma unroll
      for (int i = 0; i < 8; i++) z[c][i] *= v[i];
    }
    if (a.norm_bias.data) {
      unpack8(load8(a.norm_bias.data, a.norm_bias.dtype, n), a.norm_bias.dtype, v);
#pragma unroll
      for (int i = 0; i < 8; i++) z[c][i] += v[i];
    }
    if (p.dropout.threshold) {
      const uint32_t kept =
          keep_bits(p.dropout, key, c * threads + thread, static_cast<uint32_t>(m));
#pragma unroll
      for (int i = 0; i < 8; i++) z[c][i] = kept >> i & 1 ? z[c][i] * p.dropout.scale : 0.0f;
    }
    store8(a.out.data, a.out.dtype, out + n, z[c]);
  }
}

__global__ void __launch_bounds__(256) embed_fwd_any(const __grid_constant__ Embed p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_embed& a = p.a;
  const int64_t m = blockIdx.x;
  const Places at = places(a, m);
  float sum[1] = {0.0f}, square[1] = {0.0f}, mean = 0.0f, rstd = 1.0f;
  if (a.norm == 1) {
    for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) sum[0] += sum_tables(a, at, n);
    block_sum(sum, scratch);
    mean = a.N ? sum[0] / a.N : 0.0f;
  }
  if (a.norm) {
    for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) {
      const float centered = sum_tables(a, at, n) - mean;
      square[0] += centered * centered;
    }
    block_sum(square, scratch);
    rstd = 1.0f / sqrtf((a.N ? square[0] / a.N : 0.0f) + static_cast<float>(a.eps));
    if (threadIdx.x == 0) {
      if (a.norm == 1) store(a.mean + m, mean);
      store(a.rstd + m, rstd);
    }
  }
  const Key key = load_key(p.dropout);
  const int64_t out = row_offset(a.out, m);
  for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) {
    float y = (sum_tables(a, at, n) - mean) * rstd;
    const fasttx_rows &weight = a.norm_weight, &bias = a.norm_bias;
    if (weight.data) y *= load1(weight.data, weight.dtype, n * weight.column);
    if (bias.data) y += load1(bias.data, bias.dtype, n * bias.column);
    store1(a.out.data, a.out.dtype, out + n * a.out.column, dropped(p, key, m, n, y));
  }
}

}  // namespace
}  // namespace fasttx

// A cudaError_t.
FASTTX_API int fasttx_cuda_embed_fwd(const fasttx_embed& a, void* stream) {
  using namespace fasttx;
  const int64_t N = a.N, M = a.M;
  if (M == 0) return 0;
  const Embed p = embed_arguments(a);
  const dim3 rows(static_cast<unsigned>(M)), groups(static_cast<unsigned>((M + WARPS - 1) / WARPS));
  bool even = N % 8 == 0 && N > 0 && N <= 16384 && by_eight(a.norm_weight) &&
              by_eight(a.norm_bias) && by_eight(a.out);
  for (const fasttx_rows& table : a.table) even &= by_eight(table);
  if (!even) return launch(embed_fwd_any, rows, 256, 128, stream, p);
  if (N <= 256) return launch(embed_fwd<1, true>, groups, 32 * WARPS, 0, stream, p);
  if (N <= 512) return launch(embed_fwd<2, true>, groups, 32 * WARPS, 0, stream, p);
  if (N <= 768) return launch(embed_fwd<3, true>, groups, 32 * WARPS, 0, stream, p);
  if (N <= 1024) return launch(embed_fwd<4, true>, groups, 32 * WARPS, 0, stream, p);
  const int threads = static_cast<int>((N + 4 * 8 * 32 - 1) / (4 * 8 * 32) * 32);
  return launch(embed_fwd<4, false>, rows, threads, 128, stream, p);
}
