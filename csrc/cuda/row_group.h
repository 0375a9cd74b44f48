// A row by a group of threads, each with eight columns of every 8 * lanes, kept in registers: up to
// 1024 columns by 8, 16 or 32 lanes of a warp, so that every lane has several loads under way, up
// to 16384 by all threads of a block.
#pragma once
#include "cuda/eight.h"
#include "cuda/reduce.h"

namespace fasttx {

constexpr int CHUNKS = 4;  // times eight columns, at most
constexpr int ROW_COLUMNS = 16384;

struct RowGroup {
  int lanes, shift;  // of a row; the rows of a block are 2^shift threads apart
  int rows;          // of a block
};

inline RowGroup row_group(int64_t columns) {
  constexpr int each = 8 * CHUNKS, warps = 4;
  if (columns > 32 * each)
    return {static_cast<int>((columns + 32 * each - 1) / (32 * each) * 32), 10, 1};
  const int shift = columns <= 8 * each ? 3 : columns <= 16 * each ? 4 : 5;
  return {1 << shift, shift, 32 * warps >> shift};
}
inline int threads_of(const RowGroup& g) { return g.lanes * g.rows; }
inline dim3 blocks_of(const RowGroup& g, int64_t rows) {
  return dim3(static_cast<unsigned>((rows + g.rows - 1) / g.rows));
}
constexpr size_t ROW_SCRATCH = 32 * 4;  // bytes of shared memory

FASTTX_DEVICE int64_t row_of_group(const RowGroup& g) {
  return int64_t{blockIdx.x} * g.rows + (threadIdx.x >> g.shift);
}
FASTTX_DEVICE int lane_of_group(const RowGroup& g) { return threadIdx.x & ((1 << g.shift) - 1); }

// Over the row, the same in all its threads. Every thread of the block takes part.
template <int K>
FASTTX_DEVICE void row_sum(const RowGroup& g, float (&x)[K], float* scratch) {
  if (g.lanes > 32) {
    block_sum(x, scratch);
    return;
  }
#pragma unroll
  for (int with = 16; with; with /= 2)
    if (with < g.lanes)
#pragma unroll
      for (int k = 0; k < K; k++) x[k] += __shfl_xor_sync(~0u, x[k], with);
}
FASTTX_DEVICE float row_max(const RowGroup& g, float x, float* scratch) {
  if (g.lanes > 32) return block_max(x, scratch);
#pragma unroll
  for (int with = 16; with; with /= 2)
    if (with < g.lanes) x = fmaxf(x, __shfl_xor_sync(~0u, x, with));
  return x;
}

}  // namespace fasttx
