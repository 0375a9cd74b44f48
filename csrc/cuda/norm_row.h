// What add_norm and embed share: a row's mean and deviation, the normalized row, and backward the
// sums over the rows for its parameters.
#pragma once
#include "cuda/philox.h"
#include "cuda/row_group.h"
#include "cuda/rows.h"

namespace fasttx {

struct Moments {
  float mean, rstd;
};
FASTTX_DEVICE float deviation(float squares, int64_t columns, double eps) {
  return 1.0f / sqrtf((columns ? squares / columns : 0.0f) + static_cast<float>(eps));
}

// Of a row in registers, which ends at column `end` (0: no row); uncentred: the mean is 0.
FASTTX_DEVICE Moments row_moments(const RowGroup& g, const float (&z)[CHUNKS][8], int end,
                                  int64_t columns, bool centred, double eps, float* scratch) {
  const int first = lane_of_group(g) * 8, step = g.lanes * 8;
  float mean = 0.0f, sum[1] = {0.0f}, square[1] = {0.0f};
  if (centred) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (first + c * step < end)
#pragma unroll
        for (int i = 0; i < 8; i++) sum[0] += z[c][i];
    row_sum(g, sum, scratch);
    mean = sum[0] / columns;
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (first + c * step < end)
#pragma unroll
      for (int i = 0; i < 8; i++) square[0] += (z[c][i] - mean) * (z[c][i] - mean);
  row_sum(g, square, scratch);
  return {mean, deviation(square[0], columns, eps)};
}
// Of a row by a block that reads it once a pass: z(n) is a column's number.
template <class Z>
FASTTX_DEVICE Moments row_moments(Z z, int64_t columns, bool centred, double eps, float* scratch) {
  float mean = 0.0f, sum[1] = {0.0f}, square[1] = {0.0f};
  if (centred) {
    for (int64_t n = threadIdx.x; n < columns; n += blockDim.x) sum[0] += z(n);
    block_sum(sum, scratch);
    mean = columns ? sum[0] / columns : 0.0f;
  }
  for (int64_t n = threadIdx.x; n < columns; n += blockDim.x)
    square[0] += (z(n) - mean) * (z(n) - mean);
  block_sum(square, scratch);
  return {mean, deviation(square[0], columns, eps)};
}

// Eight columns, and one of any strides.
FASTTX_DEVICE void normalize(const Moments& by, const fasttx_rows& weight, const fasttx_rows& bias,
                             int64_t n, float (&z)[8]) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) z[i] = (z[i] - by.mean) * by.rstd;
  if (weight.data) {
    unpack8(load8(weight.data, weight.dtype, n), weight.dtype, v);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] *= v[i];
  }
  if (bias.data) {
    unpack8(load8(bias.data, bias.dtype, n), bias.dtype, v);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] += v[i];
  }
}
FASTTX_DEVICE float normalize(const Moments& by, const fasttx_rows& weight, const fasttx_rows& bias,
                              int64_t n, float z) {
  z = (z - by.mean) * by.rstd;
  if (weight.data) z *= load1(weight.data, weight.dtype, n * weight.column);
  if (bias.data) z += load1(bias.data, bias.dtype, n * bias.column);
  return z;
}

// The rows that a block sums for the parameters: enough parts to fill the device, and so few that
// adding them up costs little. even: rows in registers, eight columns a thread, to 256 columns by
// the warps of a block and to 4096 by all of it.
struct Parts {
  bool even;
  int64_t rows, count;
  RowGroup group;
};
inline Parts parts_of(int64_t M, int64_t N, bool even) {
  const bool by_warps = N <= 256;
  const int threads = static_cast<int>((N + 255) / 256 * 32);
  const RowGroup group = by_warps ? RowGroup{32, 5, 4} : RowGroup{threads, 10, 1};
  const int64_t least = even && by_warps ? 4 * group.rows : 8;
  const int64_t most = int64_t{multiprocessors()} * (even && N > 2048 ? 2 : 4);
  const int64_t count = max(int64_t{1}, min(most, (M + least - 1) / least));
  const int64_t rows = (M + count - 1) / count;
  return {even, rows, rows ? (M + rows - 1) / rows : 0, group};
}
inline size_t part_scratch(const RowGroup& g) {
  return g.rows > 1 ? g.rows * 8 * 32 * 4 : 2 * 32 * 4;
}

// A thread's sums of its eight columns from n on become the block's, in order; of kind k to
// partials [blocks, 3, N] where bit k of `wanted` is set. scratch: g.rows * 256 floats.
template <int K>
FASTTX_DEVICE void store_part(const RowGroup& g, float (&sums)[K][8], int wanted, float* partials,
                              int64_t N, int n, float* scratch) {
  const int lane = lane_of_group(g), row = threadIdx.x >> g.shift;
#pragma unroll
  for (int kind = 0; kind < K; kind++) {
    if (!(wanted >> kind & 1)) continue;
    if (g.rows > 1) {
      // The other warps hand theirs to the first.
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 8; i++) scratch[(row * 8 + i) * 32 + lane] = sums[kind][i];
      __syncthreads();
      if (row) continue;
#pragma unroll
      for (int i = 0; i < 8; i++)
        for (int w = 1; w < g.rows; w++) sums[kind][i] += scratch[(w * 8 + i) * 32 + lane];
    }
    if (n < N) store8(partials + (int64_t{blockIdx.x} * 3 + kind) * N, FASTTX_F32, n, sums[kind]);
  }
}

// The same of one column a lane and eight rows at once; the part is blockIdx.y. scratch: K * 256
// floats.
template <int K>
FASTTX_DEVICE void store_part(const float (&sums)[K], int wanted, float* partials, int64_t N,
                              int64_t n, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int kind = 0; kind < K; kind++) scratch[(kind * 8 + warp) * 32 + lane] = sums[kind];
  __syncthreads();
  if (warp || n >= N) return;
  for (int kind = 0; kind < K; kind++) {
    if (!(wanted >> kind & 1)) continue;
    float sum = 0.0f;
    for (int w = 0; w < 8; w++) sum += scratch[(kind * 8 + w) * 32 + lane];
    store(partials + (int64_t{blockIdx.y} * 3 + kind) * N + n, sum);
  }
}

// Of a row's gradient: the means of g(n) and of g(n) xhat(n).
template <class G, class Xhat>
FASTTX_DEVICE float2 row_means(G g, Xhat xhat, int64_t columns, bool centred, float* scratch) {
  float means[2] = {0.0f, 0.0f};
  for (int64_t n = threadIdx.x; n < columns; n += blockDim.x) {
    const float x = g(n);
    means[0] += x;
    means[1] += x * xhat(n);
  }
  block_sum(means, scratch);
  return {centred ? means[0] / columns : 0.0f, means[1] / columns};
}

// g of eight columns (times the norm's weight) becomes the gradient of what was normalized.
FASTTX_DEVICE void weigh(const fasttx_rows& weight, int64_t n, float (&g)[8]) {
  if (!weight.data) return;
  float v[8];
  unpack8(load8(weight.data, weight.dtype, n), weight.dtype, v);
#pragma unroll
  for (int i = 0; i < 8; i++) g[i] *= v[i];
}

}  // namespace fasttx
