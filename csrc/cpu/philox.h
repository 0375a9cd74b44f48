// Philox4x32-10 (Salmon et al., SC'11) for W rows at once: lanes are queries. One call gives eight
// 16-bit numbers a row, those of columns 8 * column_group .. 8 * column_group + 7.
#pragma once
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;

struct Dropout {
  uint32_t threshold;  // a probability is kept where its 16-bit number >= threshold; 0: no dropout
  uint32_t keys[10][2];  // of the ten rounds
  float keep_scale;  // 65536 / (65536 - threshold)
};

FASTTX_INLINE Dropout make_dropout(double p, const void* seed) {
  Dropout d = {};
  d.keep_scale = 1.0f;
  const double t = p * 65536.0 + 0.5;
  d.threshold = t >= 65535.0 ? 65535 : (uint32_t)t;
  if (d.threshold == 0) return d;
  uint64_t key;
  __builtin_memcpy(&key, seed, 8);
  for (uint32_t round = 0; round < 10; round++) {
    d.keys[round][0] = (uint32_t)key + round * PHILOX_W0;
    d.keys[round][1] = (uint32_t)(key >> 32) + round * PHILOX_W1;
  }
  d.keep_scale = 65536.0f / (float)(65536 - d.threshold);
  return d;
}

// High and low words of the 32 x 32 bit products x * m.
FASTTX_INLINE void multiply_wide(vu x, uint32_t m, vu* high, vu* low) {
#if FASTTX_AVX512
  const __m512i mm = _mm512_set1_epi32((int)m);
  const __m512i even = _mm512_mul_epu32((__m512i)x, mm);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), mm);
  *high = (vu)_mm512_mask_movehdup_ps((__m512)odd, 0x5555, (__m512)even);
  *low = (vu)_mm512_mask_moveldup_ps((__m512)even, 0xaaaa, (__m512)odd);
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

// Rounds FIRST .. 9 of counters c.
template <int FIRST>
FASTTX_INLINE void philox_rounds(const Dropout& d, vu c0, vu c1, vu c2, vu c3, vu* out) {
#if FASTTX_AVX512
  // Even and odd lanes apart, one in 64 bits, so that a product is one instruction. Whatever stands
  // above the low 32 bits is ignored.
  const __m512i m0 = _mm512_set1_epi32((int)PHILOX_M0), m1 = _mm512_set1_epi32((int)PHILOX_M1);
  __m512i half[2][4];
  FASTTX_UNROLL(2)
  for (int odd = 0; odd < 2; odd++) {
    __m512i a0 = _mm512_srli_epi64((__m512i)c0, 32 * odd), a1 = _mm512_srli_epi64((__m512i)c1, 32 * odd);
    __m512i a2 = _mm512_srli_epi64((__m512i)c2, 32 * odd), a3 = _mm512_srli_epi64((__m512i)c3, 32 * odd);
    FASTTX_UNROLL(10)
    for (int round = FIRST; round < 10; round++) {
      const __m512i p0 = _mm512_mul_epu32(a0, m0), p1 = _mm512_mul_epu32(a2, m1);
      a0 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p1, 32), a1,
                                     _mm512_set1_epi32((int)d.keys[round][0]), 0x96);
      a1 = p1;
      a2 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p0, 32), a3,
                                     _mm512_set1_epi32((int)d.keys[round][1]), 0x96);
      a3 = p0;
    }
    half[odd][0] = a0;
    half[odd][1] = a1;
    half[odd][2] = a2;
    half[odd][3] = a3;
  }
  FASTTX_UNROLL(4)
  for (int w = 0; w < 4; w++)
    out[w] = (vu)_mm512_mask_moveldup_ps((__m512)half[0][w], 0xaaaa, (__m512)half[1][w]);
#else
  FASTTX_UNROLL(10)
  for (int round = FIRST; round < 10; round++) {
    vu h0, l0, h1, l1;
    multiply_wide(c0, PHILOX_M0, &h0, &l0);
    multiply_wide(c2, PHILOX_M1, &h1, &l1);
    c0 = h1 ^ c1 ^ d.keys[round][0];
    c1 = l1;
    c2 = h0 ^ c3 ^ d.keys[round][1];
    c3 = l0;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
#endif
}
FASTTX_INLINE void philox_words(const Dropout& d, vu c0, vu c1, vu c2, vu c3, vu* out) {
  philox_rounds<0>(d, c0, c1, c2, c3, out);
}

// What W rows of a head have in common for all columns: the product of the second round.
struct PhiloxRows {
  vu high, low;
};
FASTTX_INLINE uint32_t high_word(uint32_t x, uint32_t m) { return (uint32_t)(((uint64_t)x * m) >> 32); }
FASTTX_INLINE PhiloxRows philox_rows(const Dropout& d, vu row, uint32_t head) {
  PhiloxRows r;
  multiply_wide(row ^ (high_word(head, PHILOX_M1) ^ d.keys[0][0]), PHILOX_M0, &r.high, &r.low);
  return r;
}

// out[w] holds columns 8 * column_group + 2w (low half) and + 2w + 1 (high half) of every row.
FASTTX_INLINE void philox(const Dropout& d, const PhiloxRows& rows, uint32_t column_group,
                          uint32_t head, uint32_t batch, vu* out) {
  // Until the third round some words are the same in all lanes.
  const uint32_t a2 = high_word(column_group, PHILOX_M0) ^ batch ^ d.keys[0][1];
  const uint32_t a3 = column_group * PHILOX_M0;
  const uint32_t b0 = high_word(a2, PHILOX_M1) ^ (head * PHILOX_M1) ^ d.keys[1][0];
  const uint32_t b1 = a2 * PHILOX_M1;
  const vu b2 = rows.high ^ (a3 ^ d.keys[1][1]);
  vu high, low;
  multiply_wide(b2, PHILOX_M1, &high, &low);
  philox_rounds<3>(d, high ^ (b1 ^ d.keys[2][0]), low,
                   rows.low ^ (high_word(b0, PHILOX_M0) ^ d.keys[2][1]), b0 * PHILOX_M0 - vu{},
                   out);
}
FASTTX_INLINE void philox(const Dropout& d, uint32_t column_group, vu row, uint32_t head,
                          uint32_t batch, vu* out) {
  philox(d, philox_rows(d, row, head), column_group, head, batch, out);
}

// The 16-bit numbers of columns 8 first_group, ... of one row, in order; writes a multiple of 8 W of
// them.
// Lane 4 q + i computes column group (W / 4) i + q, so that the transposes inside 128 bits that
// bring its four words together leave the groups in order.
FASTTX_INLINE void philox_row(const Dropout& d, int64_t columns, uint32_t row, uint32_t head,
                              uint32_t batch, uint16_t* out, uint32_t first_group = 0) {
  const vi lane = lane_index();
  const vu group = (vu)((lane & 3) * (W / 4) + (lane >> 2)) + first_group;
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
