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

// out[w] holds columns 8 * column_group + 2w (low half) and + 2w + 1 (high half) of every row.
FASTTX_INLINE void philox(const Dropout& d, uint32_t column_group, vu row, uint32_t head,
                          uint32_t batch, vu* out) {
  vu c0 = column_group - vu{}, c1 = row, c2 = head - vu{}, c3 = batch - vu{};
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
