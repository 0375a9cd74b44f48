// Activations by their code in fasttx/ops/linear.py, in fp32.
#pragma once
#include "cuda/ptx/math.h"

namespace fasttx {

FASTTX_DEVICE float exp_approx(float x) { return exp2_approx(1.4426950408889634f * x); }
FASTTX_DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exp_approx(-x)); }

// 0.5 erfc(z), z >= 0, within 1.2e-7 of its value (Press et al., Numerical Recipes, section 6.2).
FASTTX_DEVICE float half_erfc(float z) {
  const float t = reciprocal_approx(1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return 0.5f * t * exp_approx(p - z * z);
}

// x becomes act(x), and slope act'(x) where SLOPE.
template <bool SLOPE, int N>
FASTTX_DEVICE void activate(int activation, float (&x)[N], float (&slope)[N]) {
  switch (activation) {
    case 1:
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float z = 0.7071067811865476f * fabsf(x[i]), tail = half_erfc(z);
        const float cdf = x[i] < 0.0f ? tail : 1.0f - tail;
        if (SLOPE) slope[i] = cdf + x[i] * (0.3989422804014327f * exp_approx(-z * z));
        x[i] *= cdf;
      }
      return;
    case 2:
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float square = x[i] * x[i];
        const float s = sigmoid(1.5957691216057308f * x[i] * (1.0f + 0.044715f * square));
        const float rise = 1.5957691216057308f * (1.0f + 0.134145f * square);
        if (SLOPE) slope[i] = s + x[i] * s * (1.0f - s) * rise;
        x[i] *= s;
      }
      return;
    case 3:
#pragma unroll
      for (int i = 0; i < N; i++) {
        if (SLOPE) slope[i] = x[i] > 0.0f ? 1.0f : 0.0f;
        x[i] = x[i] <= 0.0f ? 0.0f : x[i];  // NaN stays
      }
      return;
    case 4:
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float s = sigmoid(x[i]);
        if (SLOPE) slope[i] = s * (1.0f + x[i] * (1.0f - s));
        x[i] *= s;
      }
      return;
    default:
      if (SLOPE) {
#pragma unroll
        for (int i = 0; i < N; i++) slope[i] = 1.0f;
      }
  }
}

}  // namespace fasttx
