// Scores from products, with softcap(x) = cap tanh(x / cap).
#pragma once
#include "cuda/attention.h"
#include "cuda/ptx/math.h"

namespace fasttx {

// To 1e-7 of the whole; what is not finite shows.
FASTTX_DEVICE float tanh_approx(float x) {
  return 1.0f - 2.0f * reciprocal_approx(exp2_approx(x * (2.0f * LOG2E)) + 1.0f);
}

// Of a product q k^T. Where it is capped, bend is the softcap's derivative.
FASTTX_DEVICE float score_of(const Attention& p, float product) {
  const float x = product * p.scale;
  return p.cap == 0.0f ? x : p.cap * tanh_approx(x);
}
FASTTX_DEVICE float score_of(const Attention& p, float product, float& bend) {
  const float x = product * p.scale;
  bend = 1.0f;
  if (p.cap == 0.0f) return x;
  const float y = tanh_approx(x);
  bend = 1.0f - y * y;
  return p.cap * y;
}

}  // namespace fasttx
