// What the kernels of cross_entropy share: the arguments on the device, and sweeps over a row.
#pragma once
#include "cpu/cross_entropy.h"
#include "cuda/eight.h"
#include "cuda/ptx/math.h"
#include "cuda/reduce.h"

namespace fasttx {

constexpr float LOG2E = 1.4426950408889634f;

struct CrossEntropy {
  fasttx_cross_entropy a;
  int64_t rows, per_batch;  // M; rows of a batch
  int V;
  float* norm;        // [2]: what cross-entropy and z-loss are multiplied by
  float* terms;       // [M]: cross-entropy of each row
  float* weight_sum;  // of all classes; absent: their number
  int later;          // in place: norm[0] is left to the factor
};

FASTTX_DEVICE int64_t row_of(const fasttx_tensor& t, const CrossEntropy& p, int64_t m) {
  return m / p.per_batch * t.strides[0] + m % p.per_batch * t.strides[1];
}
FASTTX_DEVICE int64_t target_of(const CrossEntropy& p, int64_t m) {
  return load(static_cast<const int64_t*>(p.a.target.data) + m);
}
FASTTX_DEVICE float weight_of(const CrossEntropy& p, int64_t n) {
  return p.a.weight.data ? load(static_cast<const float*>(p.a.weight.data) + n) : 1.0f;
}

// The row's numbers, each by one thread: eight(n, x) for columns n .. n + 7 that lie in aligned 16
// bytes, one(n, x) for the others. A row may begin anywhere (the vocabulary may be odd).
template <int IN_FLIGHT, class T, class Eight, class One>
FASTTX_DEVICE void sweep(const T* row, int64_t stride, int V, bool by_eight, Eight eight, One one) {
  int lead = V, vectors = 0;
  if (by_eight) {
    lead = min(V, static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / 2));
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
        unpack8<T>(words[i], x);
        eight(lead + (first + i * static_cast<int>(blockDim.x)) * 8, x);
      }
  }
  // Before the first vector and after the last.
  for (int i = threadIdx.x; i < V - 8 * vectors; i += blockDim.x) {
    const int n = i < lead ? i : i + 8 * vectors;
    one(n, to_float(load(row + n * stride)));
  }
}

}  // namespace fasttx
