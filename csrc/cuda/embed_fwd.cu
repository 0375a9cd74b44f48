// out = dropout(norm(scale * token + position + segment)): rows of up to 16384 columns in registers
// between one read of each table's row and one write (row_group.h); others, and those of odd
// strides, by a block that reads them once a pass.
#include "cuda/embed.h"

namespace fasttx {
namespace {

FASTTX_DEVICE void store_moments(const fasttx_embed& a, int64_t m, const Moments& by) {
  if (a.norm == 1) store(a.mean + m, by.mean);
  store(a.rstd + m, by.rstd);
}

__global__ void __launch_bounds__(512) embed_fwd(const __grid_constant__ Embed p) {
  FASTTX_SHARED(shared);
  const fasttx_embed& a = p.a;
  const int64_t own = row_of_group(p.group), m = own < a.M ? own : 0;
  const int N = own < a.M ? static_cast<int>(a.N) : 0;
  const int lane = lane_of_group(p.group), step = p.group.lanes * 8, first = lane * 8;
  const Places at = places(a, m);

  Bits8 token[CHUNKS], position[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = first + c * step;
    if (n >= N || !at.inside) continue;
    token[c] = load_table(a, FASTTX_TOKEN, at, n);
    if (a.table[FASTTX_POSITION].data) position[c] = load_table(a, FASTTX_POSITION, at, n);
  }
  float z[CHUNKS][8];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (first + c * step < N) sum_tables(a, at, token[c], position[c], first + c * step, z[c]);

  Moments by = {0.0f, 1.0f};
  if (a.norm) {
    by = row_moments(p.group, z, N, a.N, a.norm == 1, a.eps, reinterpret_cast<float*>(shared));
    if (N && lane == 0) store_moments(a, m, by);
  }
  const Key key = load_key(p.dropout);
  const int64_t out = row_offset(a.out, m);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int n = first + c * step;
    if (n >= N) continue;
    normalize(by, a.norm_weight, a.norm_bias, n, z[c]);
    if (p.dropout.threshold)
      drop(p.dropout, keep_bits(p.dropout, key, n / 8, static_cast<uint32_t>(m)), z[c]);
    store8(a.out.data, a.out.dtype, out + n, z[c]);
  }
}

__global__ void __launch_bounds__(256) embed_fwd_any(const __grid_constant__ Embed p) {
  FASTTX_SHARED(shared);
  const fasttx_embed& a = p.a;
  const int64_t m = blockIdx.x;
  const Places at = places(a, m);
  auto z = [&](int64_t n) { return sum_tables(a, at, n); };
  Moments by = {0.0f, 1.0f};
  if (a.norm) {
    by = row_moments(z, a.N, a.norm == 1, a.eps, reinterpret_cast<float*>(shared));
    if (threadIdx.x == 0) store_moments(a, m, by);
  }
  const Key key = load_key(p.dropout);
  const int64_t out = row_offset(a.out, m);
  for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x)
    store1(a.out.data, a.out.dtype, out + n * a.out.column,
           drop(p.dropout, key, m, n, normalize(by, a.norm_weight, a.norm_bias, n, z(n))));
}

}  // namespace
}  // namespace fasttx

// A cudaError_t.
FASTTX_API int fasttx_cuda_embed_fwd(const fasttx_embed& a, void* stream) {
  using namespace fasttx;
  if (a.M == 0) return 0;
  const Embed p = embed_arguments(a);
  bool even = a.N % 8 == 0 && a.N > 0 && a.N <= ROW_COLUMNS && by_eight(a.norm_weight) &&
              by_eight(a.norm_bias) && by_eight(a.out);
  for (const fasttx_rows& table : a.table) even &= by_eight(table);
  if (even)
    return launch(embed_fwd, blocks_of(p.group, a.M), threads_of(p.group), ROW_SCRATCH, stream, p);
  return launch(embed_fwd_any, dim3(static_cast<unsigned>(a.M)), 256, 128, stream, p);
}
