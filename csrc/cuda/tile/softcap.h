// softcap(x) = cap tanh(x / cap).
#pragma once
#include "cuda/numbers.h"
#include "cuda/ptx/math.h"

namespace fasttx {

// To 1e-7 of the whole; what is not finite shows.
FASTTX_DEVICE float tanh_approx(float x) {
  return 1.0f - 2.0f * reciprocal_approx(exp2_approx(x * (2.0f * LOG2E)) + 1.0f);
}

}  // namespace fasttx
