// The activations of linear and ffn, and their derivatives. NaN stays NaN.
#pragma once
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, RELU = 3, SILU = 4 };

// Rational in x^2, absolute error about 2e-7; beyond the clamp erf is 1 in fp32.
FASTTX_INLINE vf erf(vf x) {
  const vf t = max(set1(-3.7439211627767994f), min(set1(3.7439211627767994f), x)), z = t * t;
  vf p = set1(0.00022905065861350646f);
  p = fma(p, z, set1(0.0034082910107109506f));
  p = fma(p, z, set1(0.050955695062380861f));
  p = fma(p, z, set1(0.18520832239976145f));
  p = fma(p, z, set1(1.128379143519084f));
  vf q = set1(-1.1791602954361697e-7f);
  q = fma(q, z, set1(0.000023547966471313185f));
  q = fma(q, z, set1(0.0010179625278914885f));
  q = fma(q, z, set1(0.014070470171167667f));
  q = fma(q, z, set1(0.11098505178285362f));
  q = fma(q, z, set1(0.49746925110067538f));
  q = fma(q, z, set1(1.0f));
  return t * p / q;
}

FASTTX_INLINE vf logistic(vf x) {
  const vf e = exp2<6>(min(set1(126.0f), x * set1(-LOG2E)));
  return set1(1.0f) / (set1(1.0f) + e);
}

constexpr float GELU_CUBE = 0.044715f, GELU_SCALE = 0.7978845608028654f;

template <int A>
FASTTX_INLINE vf activate(vf x) {
  if constexpr (A == GELU) {
    const vf half = set1(0.5f) * x;
    return fma(half, erf(set1(0.70710678118654752f) * x), half);
  } else if constexpr (A == GELU_TANH) {
    const vf u = set1(GELU_SCALE) * x * fma(set1(GELU_CUBE) * x, x, set1(1.0f));
    const vf half = set1(0.5f) * x;
    return fma(half, tanh(u), half);
  } else if constexpr (A == RELU) {
    return max(vf{}, x);
  } else if constexpr (A == SILU) {
    return x * logistic(x);
  } else {
    return x;
  }
}

// The activation and its derivative.
template <int A>
FASTTX_INLINE void activate(vf x, vf* y, vf* slope) {
  if constexpr (A == GELU) {
    const vf below = fma(set1(0.5f), erf(set1(0.70710678118654752f) * x), set1(0.5f));
    const vf density = set1(0.3989422804014327f) * exp2<6>(set1(-0.5f * LOG2E) * x * x);
    *y = x * below;
    *slope = fma(x, density, below);
  } else if constexpr (A == GELU_TANH) {
    const vf z = x * x;
    const vf t = tanh(set1(GELU_SCALE) * x * fma(set1(GELU_CUBE), z, set1(1.0f)));
    const vf half = fma(set1(0.5f), t, set1(0.5f));
    const vf inner = set1(GELU_SCALE) * fma(set1(3 * GELU_CUBE), z, set1(1.0f));
    *y = x * half;
    *slope = fma(set1(0.5f) * x * fnma(t, t, set1(1.0f)), inner, half);
  } else if constexpr (A == RELU) {
    *y = max(vf{}, x);
    *slope = zero_unless(less(vf{}, x), set1(1.0f));
  } else if constexpr (A == SILU) {
    const vf s = logistic(x);
    *y = x * s;
    *slope = s * fma(x, set1(1.0f) - s, set1(1.0f));
  } else {
    *y = x;
    *slope = set1(1.0f);
  }
}

// Calls f with the tag of the activation `code`.
template <int A>
struct ActivationTag {
  static constexpr int value = A;
};
template <class F>
FASTTX_INLINE void with_activation(int code, const F& f) {
  switch (code) {
    case GELU:
      return f(ActivationTag<GELU>());
    case GELU_TANH:
      return f(ActivationTag<GELU_TANH>());
    case RELU:
      return f(ActivationTag<RELU>());
    case SILU:
      return f(ActivationTag<SILU>());
    default:
      return f(ActivationTag<NONE>());
  }
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
