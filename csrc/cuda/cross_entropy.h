// What the kernels of cross_entropy share: the arguments on the device, and sweeps over a row.
#pragma once
#include "cpu/cross_entropy.h"
#include "cuda/ptx/math.h"
#include "cuda/reduce.h"
#include "cuda/sweep.h"

namespace fasttx {

struct CrossEntropy {
  fasttx_cross_entropy a;
  int64_t rows, per_batch;  // M; rows of a batch
  int V;
  float* norm;        // [2]: what cross-entropy and z-loss are multiplied by
  float* terms;       // [M]: cross-entropy of each row
  float* weight_sum;  // of all classes; absent: their number
  int in_place;       // the gradient takes the logits' place
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

}  // namespace fasttx
