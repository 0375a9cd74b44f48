// Two vectors stored side by side, past the cache where STREAM: for outputs that the cache cannot hold.
#pragma once
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "fasttx.h"

namespace fasttx::FASTTX_ISA {
namespace {

// STREAM needs p on a 64-byte boundary, and AVX-512. Without EXACT, bf16 numbers below 2^-126 may
// become 0.
template <bool STREAM, bool EXACT = false>
FASTTX_INLINE void store_two(float* p, vf a, vf b) {
#if FASTTX_AVX512
  if (STREAM) {
    _mm512_stream_ps(p, (__m512)a);
    _mm512_stream_ps(p + W, (__m512)b);
    return;
  }
#endif
  store(p, a);
  store(p + W, b);
}
template <bool STREAM, bool EXACT = false>
FASTTX_INLINE void store_two(bf16* p, vf a, vf b) {
#if FASTTX_AVX512
  __m512i both;
#if defined(__AVX512BF16__)
  // The instruction flushes subnormals.
  constexpr int SUBNORMAL = 0x20;
  if (!EXACT || __builtin_expect(!(_mm512_fpclass_ps_mask((__m512)a, SUBNORMAL) |
                                   _mm512_fpclass_ps_mask((__m512)b, SUBNORMAL)), 1))
    both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  else
#endif
    both = _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(a)), round_bf16(b), 1);
  if (STREAM) _mm512_stream_si512((__m512i*)p, both);
  else _mm512_storeu_si512(p, both);
#else
  store(p, a);
  store(p + W, b);
#endif
}
template <bool STREAM, bool EXACT = false>
FASTTX_INLINE void store_two(f16* p, vf a, vf b) {
#if FASTTX_AVX512
  const __m512i both = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm512_cvtps_ph((__m512)a, 0)), _mm512_cvtps_ph((__m512)b, 0), 1);
  if (STREAM) _mm512_stream_si512((__m512i*)p, both);
  else _mm512_storeu_si512(p, both);
#else
  store(p, a);
  store(p + W, b);
#endif
}

// Whether rows of t, each side by side, should be stored past the cache in a call that touches so many
// elements of its size.
inline bool streams(const fasttx_tensor& t, int64_t elements) {
  const int64_t size = t.dtype == FASTTX_F32 ? 4 : 2;
  int64_t edges = (int64_t)t.data;
  for (int d = 0; d < 3; d++) edges |= t.strides[d] * size;
  return FASTTX_AVX512 && elements * size >= cache_bytes() && edges % 64 == 0 &&
         t.strides[3] == 1;
}
FASTTX_INLINE void end_of_stream() {
#if FASTTX_AVX512
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
