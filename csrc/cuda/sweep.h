// A row of 16-bit numbers, swept by the threads of a block.
#pragma once
#include "cuda/eight.h"

namespace fasttx {

// How many numbers stand before the first that lies at a multiple of 16 bytes.
FASTTX_DEVICE int leading(const void* row) {
  return static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / 2);
}

// The row's numbers, each by one thread: eight(n, x) for columns n .. n + 7 that lie in aligned 16
// bytes, one(n, x) for the others. A row may begin anywhere (the vocabulary may be odd).
template <int IN_FLIGHT, class Eight, class One>
FASTTX_DEVICE void sweep(const uint16_t* row, int dtype, int64_t stride, int V, bool by_eight,
                         Eight eight, One one) {
  int lead = V, vectors = 0;
  if (by_eight) {
    lead = min(V, leading(row));
    vectors = (V - lead) / 8;
  }
  for (int first = threadIdx.x; first < vectors; first += IN_FLIGHT * blockDim.x) {
    Words words[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++)
      if (first + i * static_cast<int>(blockDim.x) < vectors)
        words[i] = load16(row + lead + (first + i * blockDim.x) * 8);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++)
      if (first + i * static_cast<int>(blockDim.x) < vectors) {
        float x[8];
        unpack8(words[i], dtype, x);
        eight(lead + (first + i * static_cast<int>(blockDim.x)) * 8, x);
      }
  }
  // Before the first vector and after the last.
  for (int i = threadIdx.x; i < V - 8 * vectors; i += blockDim.x) {
    const int n = i < lead ? i : i + 8 * vectors;
    one(n, load1(row, dtype, n * stride));
  }
}

}  // namespace fasttx
