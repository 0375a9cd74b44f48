// exp2, log2 and tanh of vectors.
#pragma once
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

// Minimax fits of 2^f on [-0.5, 0.5]: relative error 7.5e-5 (degree 3, for probabilities that are
// rounded to bf16), 2.6e-6 (degree 4) and 1.9e-9 (degree 6). NaN stays NaN, -inf gives 0, and so
// does x < -150; between that and -126 the result is subnormal or 0.
template <int DEGREE>
FASTTX_INLINE vf exp2(vf x) {
  static_assert(DEGREE == 3 || DEGREE == 4 || DEGREE == 6);
#if FASTTX_AVX512
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);  // 0 for an infinity
#else
  const vf shift = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf t = max(set1(-160.0f), x);
  const vf n = t + shift;
  const vf f = t - (n - shift);
#endif
  vf p;
  if constexpr (DEGREE == 3) {
    p = set1(0.05517149f);
    p = fma(p, f, set1(0.24261111f));
    p = fma(p, f, set1(0.69326102f));
    p = fma(p, f, set1(0.99992808f));
  } else if constexpr (DEGREE == 4) {
    p = set1(9.570101906e-3f);
    p = fma(p, f, set1(5.591786032e-2f));
    p = fma(p, f, set1(2.4024744828e-1f));
    p = fma(p, f, set1(6.9312181474e-1f));
    p = fma(p, f, set1(9.9999926145e-1f));
  } else {
    p = set1(1.5345794537e-4f);
    p = fma(p, f, set1(1.3399931079e-3f));
    p = fma(p, f, set1(9.6184890220e-3f));
    p = fma(p, f, set1(5.5503287774e-2f));
    p = fma(p, f, set1(2.4022646890e-1f));
    p = fma(p, f, set1(6.9314720574e-1f));
    p = fma(p, f, set1(1.0000000006f));
  }
#if FASTTX_AVX512
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)(x - f));
#else
  const vf y = (vf)((vi)p + ((vi)n << 23));
  const vmask tiny = less(x, set1(-126.0f));
  return x != x ? x : zero_unless(mask_not(tiny), y);
#endif
}

// 2^a and 2^b, a, b <= about 127, as bf16 pairs; relative error 7.5e-5 before rounding.
FASTTX_INLINE vi exp2_pair(vf a, vf b) {
#if FASTTX_AVX512
  // The fit on [0, 1), where 2^f in [1, 2) has bf16 steps of 2^-7: half a step is in the constant,
  // so that the low bits need only be cut off.
  vf p[2] = {a, b};
  FASTTX_UNROLL(2)
  for (int i = 0; i < 2; i++) {
    const vf f = (vf)_mm512_reduce_ps((__m512)p[i], _MM_FROUND_TO_NEG_INF);
    vf y = set1(0.07802427f);
    y = fma(y, f, set1(0.22606752f));
    y = fma(y, f, set1(0.69583342f));
    y = fma(y, f, set1(0.99992523f + 0.00390625f));
    p[i] = (vf)_mm512_scalef_ps((__m512)y, (__m512)p[i]);
  }
  return (vi)_mm512_mask_mov_epi16((__m512i)p[1], 0x55555555, (__m512i)((vu)p[0] >> 16));
#else
  return pack_pair(exp2<3>(a), exp2<3>(b));
#endif
}

// log2 of x >= 0, subnormals taken for the smallest normal number; absolute error about 1e-7.
// log2(0) = -inf, NaN stays NaN.
FASTTX_INLINE vf log2(vf x) {
  // x = 2^e m, m in [sqrt(1/2), sqrt(2)); log2(m) = 2 / ln 2 artanh((m - 1) / (m + 1))
  const vi bits = (vi)max(set1(1.17549435e-38f), x);
  const vi e = (bits - 0x3f3504f3) >> 23;
  const vf m = (vf)(bits - (e << 23));
  const vf r = (m - set1(1.0f)) / (m + set1(1.0f)), z = r * r;
  vf p = set1(0.32059889f);
  p = fma(p, z, set1(0.41219857f));
  p = fma(p, z, set1(0.57707802f));
  p = fma(p, z, set1(0.96179669f));
  p = fma(p, z, set1(2.8853901f));
  const vf y = fma(p, r, __builtin_convertvector(e, vf));
  return select(equal(x, vf{}), set1(-INF), select(less(x, set1(INF)), y, x));
}

// tanh with relative error about 2e-7; NaN stays NaN.
FASTTX_INLINE vf tanh(vf x) {
  const vf a = abs(x), z = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const vf small = fma(p * z, x, x);
  // tanh(a) = 1 - 2 / (e^2a + 1); beyond 10 it is 1 in fp32
  const vf e = exp2<6>(min(set1(10.0f), a) * set1(2.0f * LOG2E));
  const vf big = set1(1.0f) - set1(2.0f) / (e + set1(1.0f));
  const vf signed_big = (vf)(((vi)big & 0x7fffffff) | ((vi)x & (int32_t)0x80000000));
  return select(less(a, set1(0.625f)), small, signed_big);
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
