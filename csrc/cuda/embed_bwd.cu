// The gradient of the sum of the tables' rows, and those of the norm's parameters. A block has a
// part of the rows; its warps (to 256 columns) or all of its threads together (to 4096) go through
// them one by one, each read once, and keep the sums for the parameters in registers. Others, and
// odd strides, by a kernel for the rows and one for the columns.
#include "cuda/embed.h"

namespace fasttx {
namespace {

__global__ void __launch_bounds__(512) embed_bwd(const __grid_constant__ Embed p) {
  FASTTX_SHARED(shared);
  const fasttx_embed& a = p.a;
  float* scratch = reinterpret_cast<float*>(shared);
  const int thread = lane_of_group(p.group);
  const int64_t first = blockIdx.x * p.part_rows, last = min(first + p.part_rows, a.M);
  const Key key = load_key(p.dropout);
  const float per_column = 1.0f / a.N;
  const int n = thread * 8;
  const bool live = n < a.N;
  float sums[2][8] = {};

  for (int64_t m = first + (threadIdx.x >> p.group.shift); m < last; m += p.group.rows) {
    Bits8 upstream, token, position;
    Places at = {};
    float mean = 0.0f, rstd = 1.0f;
    if (live) upstream = load8(a.dout.data, a.dout.dtype, row_offset(a.dout, m) + n);
    if (a.norm) {
      at = places(a, m);
      if (live && at.inside) {
        token = load_table(a, FASTTX_TOKEN, at, n);
        if (a.table[FASTTX_POSITION].data) position = load_table(a, FASTTX_POSITION, at, n);
      }
      if (a.norm == 1) mean = load(a.mean + m);
      rstd = load(a.rstd + m);
    }
    float xhat[8] = {}, g[8] = {}, means[2] = {0.0f, 0.0f};
    if (live) {
      unpack8(upstream, a.dout.dtype, g);
      if (p.dropout.threshold)
        drop(p.dropout, keep_bits(p.dropout, key, thread, static_cast<uint32_t>(m)), g);
    }
    if (live && a.norm) {
      sum_tables(a, at, token, position, n, xhat);
#pragma unroll
      for (int i = 0; i < 8; i++) xhat[i] = (xhat[i] - mean) * rstd;
      if (p.partials) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          sums[0][i] += g[i] * xhat[i];
          sums[1][i] += g[i];
        }
      }
      weigh(a.norm_weight, n, g);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        means[0] += g[i];
        means[1] += g[i] * xhat[i];
      }
    }
    if (a.norm && p.dz.data) {
      row_sum(p.group, means, scratch);
      const float along = a.norm == 1 ? means[0] * per_column : 0.0f,
                  across = means[1] * per_column;
#pragma unroll
      for (int i = 0; i < 8; i++) g[i] = (g[i] - along - xhat[i] * across) * rstd;
    }
    if (live && p.dz.data) store8(p.dz.data, FASTTX_F32, m * a.N + n, g);
  }

  if (p.partials) store_part(p.group, sums, 3, p.partials, a.N, n, scratch);
}

FASTTX_DEVICE float upstream_of(const Embed& p, Key key, int64_t m, int64_t n) {
  const fasttx_rows& dout = p.a.dout;
  return drop(p.dropout, key, m, n,
              load1(dout.data, dout.dtype, row_offset(dout, m) + n * dout.column));
}
FASTTX_DEVICE float weighted(const fasttx_embed& a, int64_t n, float g) {
  const fasttx_rows& weight = a.norm_weight;
  return weight.data ? g * load1(weight.data, weight.dtype, n * weight.column) : g;
}

// dz of a row of any width and strides.
__global__ void __launch_bounds__(256) embed_bwd_rows(const __grid_constant__ Embed p) {
  FASTTX_SHARED(shared);
  const fasttx_embed& a = p.a;
  const Key key = load_key(p.dropout);
  const int64_t m = blockIdx.x;
  const Places at = places(a, m);
  float along = 0.0f, across = 0.0f, mean = 0.0f, rstd = 1.0f;
  auto xhat = [&](int64_t n) { return (sum_tables(a, at, n) - mean) * rstd; };
  auto gw = [&](int64_t n) { return weighted(a, n, upstream_of(p, key, m, n)); };
  if (a.norm) {
    if (a.norm == 1) mean = load(a.mean + m);
    rstd = load(a.rstd + m);
    const float2 means = row_means(gw, xhat, a.N, a.norm == 1, reinterpret_cast<float*>(shared));
    along = means.x;
    across = means.y;
  }
  for (int64_t n = threadIdx.x; n < a.N; n += blockDim.x) {
    const float d = a.norm ? (gw(n) - along - xhat(n) * across) * rstd : gw(n);
    store1(p.dz.data, FASTTX_F32, m * a.N + n, d);
  }
}

// The sums of 32 columns over the rows of a part, by 8 rows at once.
__global__ void __launch_bounds__(256) embed_bwd_columns(const __grid_constant__ Embed p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_embed& a = p.a;
  const Key key = load_key(p.dropout);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = int64_t{blockIdx.x} * 32 + lane;
  const int64_t first = blockIdx.y * p.part_rows, last = min(first + p.part_rows, a.M);
  float sums[2] = {0.0f, 0.0f};
  if (n < a.N)
    for (int64_t m = first + warp; m < last; m += 8) {
      const float mean = a.norm == 1 ? load(a.mean + m) : 0.0f;
      const float xhat = (sum_tables(a, places(a, m), n) - mean) * load(a.rstd + m);
      const float g = upstream_of(p, key, m, n);
      sums[0] += g * xhat;
      sums[1] += g;
    }
  store_part(sums, 3, p.partials, a.N, n, scratch);
}

Parts plan(const fasttx_embed& a) {
  bool even = a.N % 8 == 0 && a.N > 0 && a.N <= 4096 && by_eight(a.dout) && by_eight(a.norm_weight);
  for (const fasttx_rows& table : a.table) even &= by_eight(table);
  return parts_of(a.M, a.N, even);
}

// Whether the tables' gradient is not that of the result.
bool has_dz(const fasttx_embed& a) { return a.need & 7 && (a.norm || a.dropout_p > 0); }

}  // namespace
}  // namespace fasttx

FASTTX_API int64_t fasttx_cuda_embed_bwd_workspace(const fasttx_embed& a) {
  using namespace fasttx;
  return (has_dz(a) ? a.M * a.N : 0) + (a.need & 24 ? plan(a).count * 3 * a.N : 0);
}

// dnorm_weight and dnorm_bias; the gradient that the tables' rows are summed from: `dz`, in the
// workspace or dout. A cudaError_t.
FASTTX_API int fasttx_cuda_embed_bwd_rows(const fasttx_embed& a, float* workspace, fasttx_rows* dz,
                                          void* stream) {
  using namespace fasttx;
  *dz = a.dout;
  if (a.N == 0) return 0;
  const Parts made = plan(a);
  Embed p = embed_arguments(a);
  p.part_rows = made.rows;
  p.parts = static_cast<int>(made.count);
  p.group = made.group;
  if (has_dz(a)) {
    *dz = p.dz = {workspace, FASTTX_F32, 0, 0, {0, 0, a.N}, 1};
    workspace += a.M * a.N;
  }
  const bool sums = a.need & 24;
  if (sums) p.partials = workspace;
  int status = 0;
  if (a.M && made.even && (sums || p.dz.data)) {
    status = launch(embed_bwd, dim3(static_cast<unsigned>(p.parts)), threads_of(p.group),
                    part_scratch(p.group), stream, p);
  } else if (a.M && !made.even) {
    if (p.dz.data)
      status = launch(embed_bwd_rows, dim3(static_cast<unsigned>(a.M)), 256, 256, stream, p);
    const dim3 grid(static_cast<unsigned>((a.N + 31) / 32), p.parts);
    if (!status && sums) status = launch(embed_bwd_columns, grid, 256, 2 * 8 * 32 * 4, stream, p);
  }
  if (!status && sums)
    status = add_parts(p.partials, a.N, p.parts, a.need & 8 ? a.dnorm_weight : fasttx_rows{},
                       a.need & 16 ? a.dnorm_bias : fasttx_rows{}, {}, stream);
  return status;
}
