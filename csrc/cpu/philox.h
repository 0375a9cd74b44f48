// Philox4x32-10 (Salmon et al., SC'11) for W rows at once: lanes are queries. One call gives eight
// 16-bit numbers a row, those of columns 8 * column_group .. 8 * column_group + 7.
#pragma once
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

struct Dropout {
  uint32_t threshold;  // a probability is kept where its 16-bit number >= threshold; 0: no dropout
  uint32_t key0, key1;
  float keep_scale;  // 65536 / (65536 - threshold)
};

FASTTX_INLINE Dropout make_dropout(double p, const void* seed) {
  Dropout d = {0, 0, 0, 1.0f};
  const double t = p * 65536.0 + 0.5;
  d.threshold = t >= 65535.0 ? 65535 : (uint32_t)t;
  if (d.threshold == 0) return d;
  uint64_t key;
  __builtin_memcpy(&key, seed, 8);
  d.key0 = (uint32_t)key;
  d.key1 = (uint32_t)(key >> 32);
  d.keep_scale = 65536.0f / (float)(65536 - d.threshold);
  return d;
}

// High and low words of the 32 x 32 bit products x * m.
FASTTX_INLINE void multiply_wide(vu x, uint32_t m, vu* high, vu* low) {
#if FASTTX_AVX512
  const __m512i mm = _mm512_set1_epi32((int)m);
  const __m512i even = _mm512_mul_epu32((__m512i)x, mm);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), mm);
  *high = (vu)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  *low = (vu)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#elif FASTTX_AVX2
  const __m256i mm = _mm256_set1_epi32((int)m);
  const __m256i even = _mm256_mul_epu32((__m256i)x, mm);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), mm);
  *high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < W; i++) {
    const uint64_t p = (uint64_t)x[i] * m;
    (*high)[i] = (uint32_t)(p >> 32);
    (*low)[i] = (uint32_t)p;
  }
#endif
}

FASTTX_INLINE void philox_words(const Dropout& d, vu c0, vu c1, vu c2, vu c3, vu* out) {
  uint32_t k0 = d.key0, k1 = d.key1;
  FASTTX_UNROLL(10)
  for (int round = 0; round < 10; round++) {
    vu h0, l0, h1, l1;
    multiply_wide(c0, 0xD2511F53u, &h0, &l0);
    multiply_wide(c2, 0xCD9E8D57u, &h1, &l1);
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// out[w] holds columns 8 * column_group + 2w (low half) and + 2w + 1 (high half) of every row.
FASTTX_INLINE void philox(const Dropout& d, uint32_t column_group, vu row, uint32_t head,
                          uint32_t batch, vu* out) {
  philox_words(d, column_group - vu{}, row, head - vu{}, batch - vu{}, out);
}

// The 16-bit numbers of columns 0, 1, ... of one row, in order; writes a multiple of 8 W of them.
// Lane 4 q + i computes column group (W / 4) i + q, so that the transposes inside 128 bits that
// bring its four words together leave the groups in order.
FASTTX_INLINE void philox_row(const Dropout& d, int64_t columns, uint32_t row, uint32_t head,
                              uint32_t batch, uint16_t* out) {
  const vi lane = lane_index();
  const vu group = (vu)((lane & 3) * (W / 4) + (lane >> 2));
  for (int64_t first = 0; first < columns; first += 8 * W) {
    vu w[4];
    philox_words(d, group + (uint32_t)(first / 8), row - vu{}, head - vu{}, batch - vu{}, w);
#if FASTTX_AVX512
    const __m512i a = _mm512_unpacklo_epi32((__m512i)w[0], (__m512i)w[1]);
    const __m512i b = _mm512_unpacklo_epi32((__m512i)w[2], (__m512i)w[3]);
    const __m512i c = _mm512_unpackhi_epi32((__m512i)w[0], (__m512i)w[1]);
    const __m512i e = _mm512_unpackhi_epi32((__m512i)w[2], (__m512i)w[3]);
    const vi r[4] = {(vi)_mm512_unpacklo_epi64(a, b), (vi)_mm512_unpackhi_epi64(a, b),
                     (vi)_mm512_unpacklo_epi64(c, e), (vi)_mm512_unpackhi_epi64(c, e)};
#elif FASTTX_AVX2
    const __m256i a = _mm256_unpacklo_epi32((__m256i)w[0], (__m256i)w[1]);
    const __m256i b = _mm256_unpacklo_epi32((__m256i)w[2], (__m256i)w[3]);
    const __m256i c = _mm256_unpackhi_epi32((__m256i)w[0], (__m256i)w[1]);
    const __m256i e = _mm256_unpackhi_epi32((__m256i)w[2], (__m256i)w[3]);
    const vi r[4] = {(vi)_mm256_unpacklo_epi64(a, b), (vi)_mm256_unpackhi_epi64(a, b),
                     (vi)_mm256_unpacklo_epi64(c, e), (vi)_mm256_unpackhi_epi64(c, e)};
#else
    const __m128i a = _mm_unpacklo_epi32((__m128i)w[0], (__m128i)w[1]);
    const __m128i b = _mm_unpacklo_epi32((__m128i)w[2], (__m128i)w[3]);
    const __m128i c = _mm_unpackhi_epi32((__m128i)w[0], (__m128i)w[1]);
    const __m128i e = _mm_unpackhi_epi32((__m128i)w[2], (__m128i)w[3]);
    const vi r[4] = {(vi)_mm_unpacklo_epi64(a, b), (vi)_mm_unpackhi_epi64(a, b),
                     (vi)_mm_unpacklo_epi64(c, e), (vi)_mm_unpackhi_epi64(c, e)};
#endif
    for (int i = 0; i < 4; i++) store_int(out + first + 2 * W * i, r[i]);
  }
}

// Which of W neighbouring columns are kept, from their 16-bit numbers.
FASTTX_INLINE vmask keep_columns(const uint16_t* numbers, uint32_t threshold) {
#if FASTTX_AVX512
  return _mm256_cmpge_epu16_mask(_mm256_loadu_si256((const __m256i*)numbers),
                                 _mm256_set1_epi16((short)threshold));
#elif FASTTX_AVX2
  const vi v = (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)numbers));
  return mask_not(less(v, set1i((int)threshold)));
#else
  const __m128i h = _mm_loadl_epi64((const __m128i*)numbers);
  return mask_not(less((vi)_mm_unpacklo_epi16(h, _mm_setzero_si128()), set1i((int)threshold)));
#endif
}

// Which of the W rows keep the even column (low half of the word) and the odd one (high half).
FASTTX_INLINE vmask keep_even(vu word, uint32_t threshold) {
  return mask_not(less((vi)(word & 0xffff), set1i((int)threshold)));
}
FASTTX_INLINE vmask keep_odd(vu word, uint32_t threshold) {
  return mask_not(less((vi)(word >> 16), set1i((int)threshold)));
}
// bf16 pairs (even column low, odd column high) with the dropped halves zeroed.
FASTTX_INLINE vi drop_pair(vi pair, vu word, uint32_t threshold) {
#if FASTTX_AVX512
  return (vi)_mm512_maskz_mov_epi16(
      _mm512_cmpge_epu16_mask((__m512i)word, _mm512_set1_epi16((short)threshold)), (__m512i)pair);
#else
  const vi t = set1i((int)threshold);
  const vi low = ~((vi)(word & 0xffff) < t), high = ~((vi)(word >> 16) < t);
  return pair & ((low & 0xffff) | (high & (int32_t)0xffff0000));
#endif
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
