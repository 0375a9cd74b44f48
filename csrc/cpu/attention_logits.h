// The stage between the two products, on strips of scores s[key][NQ vectors], lanes = queries, so
// that every row statistic is a plain vector. Scores leave it multiplied by log2(e).
#pragma once
#include "cpu/attention.h"

namespace fasttx::FASTTX_ISA {
namespace {

// A mask per pair for keys j .. j+W-1 (rows of the tile) and queries i .. i+W-1 (lanes), times
// log2(e). Entries beyond S or T repeat valid ones.
template <class E>
FASTTX_INLINE void mask_tile(const E* mask, int64_t row_stride, int64_t column_stride, int64_t i,
                             int64_t j, int64_t S, int64_t T, vf* tile) {
  if (column_stride == 1 && j + W <= T) {
    FASTTX_UNROLL(16)
    for (int r = 0; r < W; r++)
      tile[r] = to_log2(load(mask + min64(i + r, S - 1) * row_stride + j));
    transpose(tile);
    return;
  }
  for (int c = 0; c < W; c++) {
    const E* column = mask + min64(j + c, T - 1) * column_stride;
    float t[W];
    for (int r = 0; r < W; r++) t[r] = to_float(column[min64(i + r, S - 1) * row_stride]);
    tile[c] = to_log2(load(t));
  }
}
struct Bool {
  uint8_t value;
};
FASTTX_INLINE float to_float(Bool b) { return b.value ? 0.0f : -INF; }
FASTTX_INLINE vf load(const Bool* p) {
#if FASTTX_AVX512
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return (vf)_mm512_mask_blend_ps(_mm_test_epi8_mask(x, x), _mm512_set1_ps(-INF), _mm512_setzero_ps());
#else
  vf r;
  for (int i = 0; i < W; i++) r[i] = to_float(p[i]);
  return r;
#endif
}
FASTTX_NOINLINE inline void load_mask_tile(const Problem& p, const Head& h, int64_t i, int64_t j,
                                           vf* tile) {
  const fasttx_tensor& m = p.a->mask;
  const int64_t base = mask_offset(p, h), rs = stride_of(m, 2), cs = stride_of(m, 3);
  switch (m.dtype) {
    case FASTTX_BOOL:
      return mask_tile((const Bool*)m.data + base, rs, cs, i, j, h.S, h.T, tile);
    case FASTTX_BF16:
      return mask_tile((const bf16*)m.data + base, rs, cs, i, j, h.S, h.T, tile);
    case FASTTX_F16:
      return mask_tile((const f16*)m.data + base, rs, cs, i, j, h.S, h.T, tile);
    default:
      return mask_tile((const float*)m.data + base, rs, cs, i, j, h.S, h.T, tile);
  }
}

// The keys between the first and the last that a bool mask shows to a query of [i, i + rows); all
// keys for any other mask.
FASTTX_NOINLINE inline Range mask_range(const Problem& p, const Head& h, int64_t i, int64_t rows) {
  const fasttx_tensor& m = p.a->mask;
  Range r = {0, h.T};
  if (m.dtype != FASTTX_BOOL || stride_of(m, 3) != 1) return r;
  const uint8_t* first = (const uint8_t*)m.data + mask_offset(p, h) + i * stride_of(m, 2);
  const int64_t stride = stride_of(m, 2);
  const auto seen = [&](int64_t j, int64_t n) {
    vi all = {};
    uint8_t rest = 0;
    for (int64_t x = 0; x < rows; x++) {
      if (n == 4 * W) all |= load_int(first + x * stride + j);
      for (int64_t c = 0; n < 4 * W && c < n; c++) rest |= first[x * stride + j + c];
    }
    return rest || any(mask_not(equal(all, vi{})));
  };
  while (r.begin < r.end && !seen(r.begin, min64(4 * W, r.end - r.begin)))
    r.begin += min64(4 * W, r.end - r.begin);
  while (r.begin < r.end && !seen(max64(r.begin, r.end - 4 * W), min64(4 * W, r.end - r.begin)))
    r.end -= min64(4 * W, r.end - r.begin);
  return r;
}

#if FASTTX_AVX512
// Hides what a bool mask hides: keys j .. j + rows - 1, one vector of queries from i.
FASTTX_INLINE void apply_bool_tile(const uint8_t* mask, int64_t row_stride, int64_t S, int64_t i,
                                   int rows, vf* s, int stride) {
  uint16_t keys[16];  // one bit a key, for each query
  FASTTX_UNROLL(16)
  for (int r = 0; r < 16; r++) {
    const __m128i x = _mm_maskz_loadu_epi8(first_lanes(rows), mask + min64(i + r, S - 1) * row_stride);
    keys[r] = _mm_test_epi8_mask(x, x);
  }
  __m256i bits = _mm256_loadu_si256((const __m256i*)keys);
  for (int k = 0; k < rows; k++) {
    const __mmask16 visible = _mm256_movepi16_mask(_mm256_sll_epi16(bits, _mm_cvtsi32_si128(15 - k)));
    s[k * stride] = select(visible, s[k * stride], set1(-INF));
  }
}
#endif

// Asks for the mask of queries [i, i + rows) and keys [j, j + nk), too many rows for the hardware to
// follow.
FASTTX_NOINLINE inline void prefetch_mask(const Problem& p, const Head& h, int64_t i, int64_t rows,
                                          int64_t j, int64_t nk) {
  const fasttx_tensor& m = p.a->mask;
  if (stride_of(m, 3) != 1 || m.sizes[2] == 1 || j >= h.T) return;
  const int64_t size = m.dtype == FASTTX_BOOL ? 1 : m.dtype == FASTTX_F32 ? 4 : 2;
  const int64_t bytes = min64(nk, h.T - j) * size;
  for (int64_t r = 0; r < min64(rows, h.S - i); r++) {
    const char* row = (const char*)m.data + (mask_offset(p, h) + (i + r) * m.strides[2] + j) * size;
    for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(row + x, 0, 3);
  }
}

// Hides what the band hides: keys j0 .. j0+nk-1, queries i0 .. i0+NQ*W-1. Selects, so that a hidden
// NaN is gone.
template <int NQ>
FASTTX_NOINLINE void apply_band(const Head& h, vf* s, int64_t i0, int64_t j0, int nk) {
  const vi lane = lane_index();
  for (int k = 0; k < nk; k++) {
    // lane l of vector v is visible where first <= v * W + l < last
    const int64_t first = j0 + k - h.high - i0, last = j0 + k - h.low - i0 + 1;
    const vi lo = set1i((int)max64(-1, min64(1 << 20, first)) - 1);
    const vi hi = set1i((int)max64(-1, min64(1 << 20, last)));
    FASTTX_UNROLL(4)
    for (int v = 0; v < NQ; v++) {
      const vi i = lane + v * W;
      s[k * NQ + v] = select(mask_and(less(lo, i), less(i, hi)), s[k * NQ + v], set1(-INF));
    }
  }
}

// True when raw scores only need the band: the scale is then applied with the maximum.
inline bool is_plain(const Problem& p, const Bias& b) {
  return p.softcap == 0.0f && p.scale > 0.0f && !b.key && !b.distance && !p.mask_per_pair;
}

// Raw scores q.k to final logits, in place: s = log2(e) * (softcap(scale * s) + biases + mask), -inf
// where hidden. capped, if given, receives tanh(scale * s / softcap) (the backward's derivative);
// top, if given, is raised to the maximum of the rows [from, to), which no edge of the band crosses.
template <int NQ>
FASTTX_NOINLINE void apply_logits(const Problem& p, const Head& h, const Bias& b, vf* s, int64_t i0,
                                  int64_t j0, int nk, vf* capped = nullptr, vf* top = nullptr,
                                  int from = 0, int to = 0) {
  vf scale = set1(p.scale * LOG2E);
  if (p.softcap > 0.0f) {
    const vf inner = set1(p.scale / p.softcap), outer = set1(p.softcap * LOG2E);
    for (int x = 0; x < nk * NQ; x++) {
      const vf t = tanh(s[x] * inner);
      if (capped) capped[x] = t;
      s[x] = t * outer;
    }
    scale = set1(1.0f);
  }
  vf m[NQ];
  for (int v = 0; v < NQ; v++) m[v] = top ? top[v] : vf{};
  const bool tiles = p.mask_per_pair;
  for (int k = 0; k < nk; k++) {
    const float* d = b.distance ? b.distance + i0 - (j0 + k) : nullptr;
    const float key = b.key ? b.key[j0 + k] : 0.0f;
    const bool counts = top && !tiles && k >= from && k < to;
    FASTTX_UNROLL(4)
    for (int v = 0; v < NQ; v++) {
      vf x = d ? fma(s[k * NQ + v], scale, load(d + v * W)) : s[k * NQ + v] * scale;
      x = key == -INF ? set1(-INF) : x + set1(key);
      s[k * NQ + v] = x;
      if (counts) m[v] = max(m[v], x);
    }
  }
  for (int k = 0; tiles && k < nk; k += W) {
    const int rows = nk - k < W ? nk - k : W;
    for (int v = 0; v < NQ; v++) {
#if FASTTX_AVX512
      const fasttx_tensor& mask = p.a->mask;
      if (mask.dtype == FASTTX_BOOL && stride_of(mask, 3) == 1) {
        apply_bool_tile((const uint8_t*)mask.data + mask_offset(p, h) + j0 + k, stride_of(mask, 2),
                        h.S, i0 + v * W, rows, s + k * NQ + v, NQ);
        continue;
      }
#endif
      vf tile[W];
      load_mask_tile(p, h, i0 + v * W, j0 + k, tile);
      for (int r = 0; r < rows; r++) {
        vf& x = s[(k + r) * NQ + v];
        x = select(equal(tile[r], set1(-INF)), set1(-INF), x + tile[r]);
      }
    }
  }
  for (int k = from; tiles && top && k < to; k++) {
    FASTTX_UNROLL(4)
    for (int v = 0; v < NQ; v++) m[v] = max(m[v], s[k * NQ + v]);
  }
  for (int v = 0; top && v < NQ; v++) top[v] = m[v];
  if (needs_band(h, i0, i0 + NQ * W, j0, j0 + nk)) apply_band<NQ>(h, s, i0, j0, nk);
}

// Dropout of probabilities p[key][NQ], keys j0 .. j0+nk-1, j0 a multiple of 8, queries from i0. Kept
// ones are not scaled: that is left to the caller (dropout.keep_scale).
template <int NQ>
FASTTX_NOINLINE void apply_dropout(const Problem& p, const Head& h, vf* s, int64_t i0, int64_t j0, int nk) {
  PhiloxRows rows[NQ];
  for (int v = 0; v < NQ; v++)
    rows[v] = philox_rows(p.dropout, (vu)(lane_index() + (int)(i0 + v * W)), (uint32_t)h.head);
  for (int k = 0; k < nk; k += 8) {
    FASTTX_UNROLL(2)
    for (int v = 0; v < NQ; v++) {
      vu words[4];
      philox(p.dropout, rows[v], (uint32_t)((j0 + k) / 8), (uint32_t)h.head, (uint32_t)h.sequence,
             words);
      for (int w = 0; w < 4 && k + 2 * w < nk; w++) {
        vf& even = s[(k + 2 * w) * NQ + v];
        even = zero_unless(keep_even(words[w], p.dropout.threshold), even);
        if (k + 2 * w + 1 == nk) break;
        vf& odd = s[(k + 2 * w + 1) * NQ + v];
        odd = zero_unless(keep_odd(words[w], p.dropout.threshold), odd);
      }
    }
  }
}
// The same for bf16 pairs pairs[key / 2][NQ]; nk is rounded up to even.
template <int NQ>
FASTTX_NOINLINE void apply_dropout_pairs(const Problem& p, const Head& h, vi* pairs, int64_t i0, int64_t j0,
                                int nk) {
  PhiloxRows rows[NQ];
  for (int v = 0; v < NQ; v++)
    rows[v] = philox_rows(p.dropout, (vu)(lane_index() + (int)(i0 + v * W)), (uint32_t)h.head);
  for (int k = 0; k < nk; k += 8) {
    FASTTX_UNROLL(2)
    for (int v = 0; v < NQ; v++) {
      vu words[4];
      philox(p.dropout, rows[v], (uint32_t)((j0 + k) / 8), (uint32_t)h.head, (uint32_t)h.sequence,
             words);
      for (int w = 0; w < 4 && k + 2 * w < nk; w++) {
        vi& x = pairs[(k / 2 + w) * NQ + v];
        x = drop_pair(x, words[w], p.dropout.threshold);
      }
    }
  }
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
