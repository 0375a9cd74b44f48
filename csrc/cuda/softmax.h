// What the kernels of softmax share: the arguments on the device, places of rows, logits.
#pragma once
#include "cpu/softmax.h"
#include "cuda/ptx/math.h"
#include "cuda/row_group.h"
#include "cuda/sweep.h"

namespace fasttx {

struct Softmax {
  fasttx_softmax a;
  int64_t rows;  // M: all of x but its last dimension
  int N;
  int64_t offset;  // causal: row i sees columns to i + offset
  float scale;
  int staged;     // a row, or a tile of rows, is kept in shared memory between two sweeps
  float* sums;    // [M], backward: what the rows' gradients need; or absent
  float* totals;  // [M], backward: the rows' sums of the gradients of the logits; or absent
  int direct;     // backward: a row's gradients of its logits are the mask's
  RowGroup group;  // of rows in registers
};

inline Softmax softmax_arguments(const fasttx_softmax& a) {
  const fasttx_tensor& x = a.x;
  return {a,
          x.sizes[0] * x.sizes[1] * x.sizes[2],
          static_cast<int>(x.sizes[3]),
          a.lower_right ? x.sizes[3] - x.sizes[2] : 0,
          static_cast<float>(a.scale),
          0,
          nullptr,
          nullptr,
          0,
          row_group(x.sizes[3])};
}

// The leading three dimensions of a row.
struct RowIndex {
  int64_t i[3];
};
FASTTX_DEVICE RowIndex row_index(int64_t m, int64_t size1, int64_t size2) {
  const int64_t outer = m / size2;
  return {{outer / size1, outer % size1, m % size2}};
}
FASTTX_DEVICE RowIndex row_index(const Softmax& p, int64_t m) {
  return row_index(m, p.a.x.sizes[1], p.a.x.sizes[2]);
}
FASTTX_DEVICE int64_t row_of(const fasttx_tensor& t, const RowIndex& at) {
  return at.i[0] * t.strides[0] + at.i[1] * t.strides[1] + at.i[2] * t.strides[2];
}

// How many columns of a row the causal rule leaves.
FASTTX_DEVICE int visible_columns(const Softmax& p, const RowIndex& at) {
  if (!p.a.causal) return p.N;
  const int64_t end = at.i[2] + p.offset + 1;
  return end <= 0 ? 0 : end < p.N ? static_cast<int>(end) : p.N;
}

// z + mask of one column, -inf where the mask hides it.
FASTTX_DEVICE float masked(const fasttx_tensor& mask, int64_t row, int64_t n, float z) {
  const int64_t at = row + n * mask.strides[3];
  if (mask.dtype == FASTTX_BOOL)
    return load(static_cast<const uint8_t*>(mask.data) + at) ? z : -INFINITY;
  const float added = load1(mask.data, mask.dtype, at);
  return added == -INFINITY ? -INFINITY : z + added;
}

// The same of columns n .. n + 7.
FASTTX_DEVICE void masked(const fasttx_tensor& mask, int64_t row, int n, float (&z)[8]) {
  const bool is_bool = mask.dtype == FASTTX_BOOL;
  const int bytes = is_bool ? 1 : mask.dtype == FASTTX_F32 ? 4 : 2;
  const char* from = static_cast<const char*>(mask.data) + (row + n * mask.strides[3]) * bytes;
  const bool even = mask.strides[3] == 1 &&
                    reinterpret_cast<uintptr_t>(from) % (is_bool ? 8 : 16) == 0;
  if (even && is_bool) {
    const uint64_t seen = load(reinterpret_cast<const uint64_t*>(from));
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] = seen >> 8 * i & 0xff ? z[i] : -INFINITY;
  } else if (even) {
    float added[8];
    unpack8(load8(from, mask.dtype, 0), mask.dtype, added);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] = added[i] == -INFINITY ? -INFINITY : z[i] + added[i];
  } else if (mask.strides[3] == 0) {
    const float one = masked(mask, row, 0, 0.0f);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] = one == -INFINITY ? -INFINITY : z[i] + one;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] = masked(mask, row, n + i, z[i]);
  }
}

// exp(z) to the left of `peak`; what is hidden gives 0.
FASTTX_DEVICE float exponential(float z, float peak) { return exp2_approx((z - peak) * LOG2E); }

// What a row's logits become results with.
struct RowScale {
  float peak, inverse, log_sum;
};
FASTTX_DEVICE RowScale row_scale(float peak, float sum) {
  return {peak, sum == 0.0f ? 0.0f : 1.0f / sum, sum == 0.0f ? 0.0f : logf(sum)};
}
FASTTX_DEVICE float result(float z, const RowScale& row, int log) {
  if (log) return z == -INFINITY ? -INFINITY : z - row.peak - row.log_sum;
  return z == -INFINITY ? 0.0f : exponential(z, row.peak) * row.inverse;
}
FASTTX_DEVICE float finite_peak(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// Raises a running maximum; the sum follows.
FASTTX_DEVICE void raise(float to, float& peak, float& sum) {
  if (to > peak) {
    sum *= exponential(peak, to);
    peak = to;
  }
}
// What a result's gradient is summed with along the row, and the gradient of its logit; a result of
// 0 (log: -inf) takes part in nothing.
FASTTX_DEVICE float weighted(float y, float dy, int log) {
  return log ? (y == -INFINITY ? 0.0f : dy) : (y == 0.0f ? 0.0f : y * dy);
}
FASTTX_DEVICE float gradient(float y, float dy, float sum, int log) {
  if (log) return y == -INFINITY ? 0.0f : dy - exp2_approx(y * LOG2E) * sum;
  return y == 0.0f ? 0.0f : y * (dy - sum);
}

// Whether eight columns lie in aligned 16 bytes in every row, and eight rows in every column.
inline bool columns_by_eight(const fasttx_tensor& t) {
  if (!t.data) return true;
  bool even = t.strides[3] == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int d = 0; d < 3; d++) even &= t.strides[d] % 8 == 0;
  return even;
}
inline bool rows_by_eight(const fasttx_tensor& t) {
  if (!t.data) return true;
  bool even = t.strides[2] == 1 && t.sizes[2] % 8 == 0;
  for (int d : {0, 1, 3}) even &= t.strides[d] % 8 == 0;
  return even && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

constexpr size_t SOFTMAX_SHARED = 99 << 10;  // bytes of a block, on every card from sm_80 on

// A tile of rows whose neighbours lie side by side: eight threads by eight rows, 32 by columns.
constexpr int TILE_ROWS = 64, TILE_COLUMNS = 32;

// Sums, or maxima, over the tile's threads that share eight rows: the same in all of them. scratch:
// 32 * 64 floats.
template <class Join>
FASTTX_DEVICE void tile_join(float (&x)[8], float* scratch, Join join) {
  const int at = threadIdx.x % 8, slot = threadIdx.x / 8;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; i++) scratch[slot * TILE_ROWS + i * 8 + at] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; i++) {
    x[i] = scratch[i * 8 + at];
#pragma unroll 2
    for (int s = 1; s < TILE_COLUMNS; s++) x[i] = join(x[i], scratch[s * TILE_ROWS + i * 8 + at]);
  }
}

}  // namespace fasttx
