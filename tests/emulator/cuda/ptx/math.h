#pragma once
#include "cuda/platform.h"

namespace fasttx {

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float reciprocal_approx(float x) {
  const float y = 1.0f / x;
  return fabsf(y) < 1.17549435e-38f ? copysignf(0.0f, y) : y;
}

}  // namespace fasttx
