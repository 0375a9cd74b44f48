// Elementwise work of the attention backward on a strip [STRIP keys][BLOCK_Q queries], fp32, lanes
// are queries: logits, probabilities, dropout, dS and what the bias gradients take of it.
#pragma once
#include "cpu/attention_bwd_pack.h"
#include "cpu/philox.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int STRIP_SIZE = STRIP * BLOCK_Q;

// Stands for the lse of a row with no visible key, or of no row: all its probabilities are 0.
constexpr float NO_ROW = 3e38f;

// Of a pair, where non-finite inputs ask for care: DROPPED is visible, with no weight on the value.
enum Visible : int32_t { HIDDEN = 0, SEEN = -1, DROPPED = INT32_MIN };

// What is added to, or hidden from, the scores of a strip.
struct StripBias {
  const float* by_distance;  // of (first query, first key); + 1 a query, - 1 a key
  const float* by_key;       // [STRIP]
  const float* mask;         // [STRIP][BLOCK_Q]
  bool band;                 // hides keys outside query + low .. min(query + high, keys - 1)
  int32_t query, key, keys, low, high;
};

// e^x for x <= about 80, relative error about 1e-7; 0 for -inf and below -104; NaN stays NaN.
FASTTX_INLINE vf exp(vf x) {
  const vf shift = set1(12582912.0f), y = max(set1(-110.0f), x);
  const vf k = fma(y, set1(LOG2E), shift) - shift;
  const vf f = fma(y, set1(1.925963033500e-8f), fms(y, set1(LOG2E), k));
  vf p = set1(1.5345794537e-4f);
  p = fma(p, f, set1(1.3399931079e-3f));
  p = fma(p, f, set1(9.6184890220e-3f));
  p = fma(p, f, set1(5.5503287774e-2f));
  p = fma(p, f, set1(2.4022646890e-1f));
  p = fma(p, f, set1(6.9314720574e-1f));
  p = fma(p, f, set1(1.0f));
#if FASTTX_AVX512
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  const vf r = (vf)((vi)p + ((vi)(k + shift) << 23));
  return select(less(x, set1(-87.0f)), vf{}, r);
#endif
}

// s = logits of scores s: softcap(scale * s) + biases, -inf where hidden. caps [STRIP][BLOCK_Q]:
// tanh, if softcap > 0. visible (if not null): SEEN or HIDDEN, as are all pairs of rows without an
// lse.
__attribute__((noinline)) void strip_logits(float* s, const StripBias& b, float scale,
                                            float softcap, const float* lse, float* caps,
                                            int32_t* visible) {
  const float inverse = softcap > 0 ? scale / softcap : 0;
  const bool hides = b.band || b.mask || b.by_key;
  for (int r = 0; r < STRIP; r++)
    for (int v = 0; v < VECS; v++) {
      const int at = r * BLOCK_Q + v * W;
      vf x = load(s + at);
      if (softcap > 0) {
        const vf t = tanh(x * inverse);
        store(caps + at, t);
        x = t * softcap;
      } else {
        x = x * scale;
      }
      if (b.by_distance) x += load(b.by_distance + v * W - r);
      vf hidden = vf{};
      if (b.by_key) hidden += b.by_key[r];
      if (b.mask) hidden += load(b.mask + at);
      if (b.band) {
        const vi query = lane_index() + (b.query + v * W), key = set1i(b.key + r);
        const vmask out = mask_or(less(key, query + b.low), less(query + b.high, key));
        hidden = select(out, set1(-INF), hidden);
        if (b.key + r >= b.keys) hidden = set1(-INF);
      }
      if (hides) x += hidden;
      if (visible) {
        const vmask out =
            mask_or(equal(hidden, set1(-INF)), equal(load(lse + v * W), set1(NO_ROW)));
        store_int(visible + at, select(out, set1i(HIDDEN), set1i(SEEN)));
        x = select(out, set1(-INF), x);
      }
      store(s + at, x);
    }
}

// s = scale * s - lse.
__attribute__((noinline)) void strip_subtract(float* s, float scale, const float* lse) {
  for (int r = 0; r < STRIP; r++)
    for (int v = 0; v < VECS; v++) {
      float* p = s + r * BLOCK_Q + v * W;
      store(p, fms(load(p), set1(scale), load(lse + v * W)));
    }
}

// keep [STRIP][BLOCK_Q]: 0 where the pair is dropped, else the scale of what is kept.
__attribute__((noinline)) void strip_keep(float* keep, const Dropout& d, int64_t key, int64_t query,
                                          int64_t head, int64_t batch) {
  const vf kept = set1(d.keep_scale);
  for (int group = 0; group < STRIP / 8; group++)
    for (int v = 0; v < VECS; v++) {
      vu words[4];
      philox(d, (uint32_t)(key / 8 + group), (vu)(lane_index() + (int32_t)(query + v * W)),
             (uint32_t)head, (uint32_t)batch, words);
      float* out = keep + group * 8 * BLOCK_Q + v * W;
      FASTTX_UNROLL(4)
      for (int w = 0; w < 4; w++) {
        store(out + 2 * w * BLOCK_Q, zero_unless(keep_even(words[w], d.threshold), kept));
        store(out + (2 * w + 1) * BLOCK_Q, zero_unless(keep_odd(words[w], d.threshold), kept));
      }
    }
}

// SEEN becomes DROPPED where keep is 0.
__attribute__((noinline)) void strip_drop(int32_t* visible, const float* keep) {
  for (int i = 0; i < STRIP_SIZE; i += W) {
    const vi x = load_int(visible + i);
    store_int(visible + i, select(equal(load(keep + i), vf{}), x & set1i(DROPPED), x));
  }
}

// p = exp(scale * s - lse), in place or not; weights, in the units of U along the queries, = p *
// keep (keep may be null). weights may be p itself when U is fp32.
template <class U>
__attribute__((noinline)) void strip_probabilities(float* p, const float* s, float scale,
                                                   const float* lse, const float* keep,
                                                   float* weights) {
  if constexpr (U::PER_UNIT == 1) {
    for (int r = 0; r < STRIP; r++) FASTTX_UNROLL(4)
    for (int v = 0; v < VECS; v++) {
      const int at = r * BLOCK_Q + v * W;
      const vf x = exp(fms(load(s + at), set1(scale), load(lse + v * W)));
      store(p + at, x);
      if (keep) store(weights + at, x * load(keep + at));
    }
  } else {
#if defined(__AVX512BF16__)
    vf base[VECS];
    for (int v = 0; v < VECS; v++) base[v] = load(lse + v * W) * LOG2E;
    const vf factor = set1(scale * LOG2E);
    for (int r = 0; r < STRIP; r++) FASTTX_UNROLL(2)
    for (int v = 0; v < VECS; v += 2) {
      const int at = r * BLOCK_Q + v * W;
      vf x = exp2<4>(fms(load(s + at), factor, base[v]));
      vf y = exp2<4>(fms(load(s + at + W), factor, base[v + 1]));
      store(p + at, x);
      store(p + at + W, y);
      if (keep) {
        x *= load(keep + at);
        y *= load(keep + at + W);
      }
      store_bf16((bf16*)weights + at, x, y);
    }
#endif
  }
}

// ds = p * (dp * keep - delta), in place or not. With `visible` not null: 0 where hidden, dp taken
// as 0 where dropped.
__attribute__((noinline)) void strip_ds(float* ds, const float* p, const float* dp,
                                        const float* delta, const float* keep,
                                        const int32_t* visible) {
  for (int r = 0; r < STRIP; r++) FASTTX_UNROLL(4)
  for (int v = 0; v < VECS; v++) {
    const int at = r * BLOCK_Q + v * W;
    vf x = load(dp + at);
    if (keep) {
      const vf kept = load(keep + at);
      x = visible ? zero_unless(mask_not(equal(kept, vf{})), x * kept) : x * kept;
    }
    x = (x - load(delta + v * W)) * load(p + at);
    if (visible) x = zero_unless(less(load_int(visible + at), vi{}), x);
    store(ds + at, x);
  }
}

// ds *= 1 - caps^2.
__attribute__((noinline)) void strip_uncap(float* ds, const float* caps) {
  for (int i = 0; i < STRIP_SIZE; i += W) {
    const vf t = load(caps + i);
    store(ds + i, load(ds + i) * fnma(t, t, set1(1.0f)));
  }
}

#if defined(__AVX512BF16__)
FASTTX_INLINE void round_strip_row_pair(float* by_query, float* by_key, int r, const vf* a,
                                        const vf* b) {
  bf16* out = (bf16*)by_query + r * BLOCK_Q;
  FASTTX_UNROLL(4)
  for (int v = 0; v < VECS; v += 2) {
    store_bf16(out + v * W, a[v], a[v + 1]);
    store_bf16(out + BLOCK_Q + v * W, b[v], b[v + 1]);
  }
  FASTTX_UNROLL(4)
  for (int v = 0; v < VECS; v++) store_int(by_key + r / 2 * BLOCK_Q + v * W, pack_pair(a[v], b[v]));
}

// ds rounded to bf16: by_query [STRIP][BLOCK_Q / 2] pairs along the queries, by_key
// [STRIP / 2][BLOCK_Q] pairs along the keys.
__attribute__((noinline)) void round_strip(float* by_query, float* by_key, const float* ds) {
  for (int r = 0; r < STRIP; r += 2) {
    vf a[VECS], b[VECS];
    FASTTX_UNROLL(4)
    for (int v = 0; v < VECS; v++) {
      a[v] = load(ds + r * BLOCK_Q + v * W);
      b[v] = load(ds + (r + 1) * BLOCK_Q + v * W);
    }
    round_strip_row_pair(by_query, by_key, r, a, b);
  }
}
// strip_ds and round_strip in one, without keep and visible.
__attribute__((noinline)) void strip_ds_rounded(float* by_query, float* by_key, const float* p,
                                                const float* dp, const float* delta) {
  vf d[VECS];
  FASTTX_UNROLL(4)
  for (int v = 0; v < VECS; v++) d[v] = load(delta + v * W);
  for (int r = 0; r < STRIP; r += 2) {
    vf a[VECS], b[VECS];
    FASTTX_UNROLL(4)
    for (int v = 0; v < VECS; v++) {
      const int at = r * BLOCK_Q + v * W;
      a[v] = (load(dp + at) - d[v]) * load(p + at);
      b[v] = (load(dp + at + BLOCK_Q) - d[v]) * load(p + at + BLOCK_Q);
    }
    round_strip_row_pair(by_query, by_key, r, a, b);
  }
}
#endif

// mask [STRIP][BLOCK_Q] = rows query .. and columns key .. of m, transposed; -inf for False, 0
// beyond `rows` rows and `columns` columns.
__attribute__((noinline)) void strip_mask(float* mask, const Matrix& m, int64_t query, int64_t key,
                                          int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < STRIP; c += W)
    for (int64_t q = 0; q < BLOCK_Q; q += W) {
      const int64_t n = min64(W, columns - key - c);
      vf x[W];
      for (int i = 0; i < W; i++) {
        x[i] = vf{};
        if (n <= 0 || query + q + i >= rows) continue;
        const int64_t at = (query + q + i) * m.row + (key + c) * m.column;
        if (m.dtype == FASTTX_BOOL) {
          const uint8_t* p = (const uint8_t*)m.data + at;
          float t[W] = {};
          for (int j = 0; j < n; j++) t[j] = p[j * m.column] ? 0.0f : -INF;
          x[i] = load(t);
        } else {
          with_type(m.dtype, m.data, [&](auto* p) { x[i] = load_any(p + at, m.column, n); });
        }
      }
      transpose(x);
      for (int i = 0; i < W; i++) store(mask + (c + i) * BLOCK_Q + q, x[i]);
    }
}

// The transpose of ds, for rows query .. and columns key .. of m, which has `rows` x `columns`:
// added to fp32 elements, or written in the dtype of m.
__attribute__((noinline)) void strip_mask_gradient(const Matrix& m, const float* ds, int64_t query,
                                                   int64_t key, int64_t rows, int64_t columns,
                                                   bool add) {
  with_type(m.dtype, m.data, [&](auto* base) {
    for (int64_t c = 0; c < STRIP; c += W)
      for (int64_t q = 0; q < BLOCK_Q; q += W) {
        const int n = (int)min64(W, columns - key - c), count = (int)min64(W, rows - query - q);
        if (n <= 0 || count <= 0) continue;
        vf x[W];
        FASTTX_UNROLL(16)
        for (int i = 0; i < W; i++) x[i] = load(ds + (c + i) * BLOCK_Q + q);
        transpose(x);
        for (int i = 0; i < count; i++) {
          auto* p = base + (query + q + i) * m.row + key + c;
          store_strided(p, 1, add ? x[i] + load_partial(p, n) : x[i], n);
        }
      }
  });
}

// out[q] += sum over the keys.
__attribute__((noinline)) void strip_query_sums(float* out, const float* ds) {
  for (int v = 0; v < VECS; v++) {
    vf sum = vf{};
    for (int r = 0; r < STRIP; r++) sum += load(ds + r * BLOCK_Q + v * W);
    store(out + v * W, load(out + v * W) + sum);
  }
}

// out[r] += sum over the queries of key r.
__attribute__((noinline)) void strip_key_sums(float* out, const float* ds) {
  for (int r = 0; r < STRIP; r++) {
    vf sum = vf{};
    for (int v = 0; v < VECS; v++) sum += load(ds + r * BLOCK_Q + v * W);
    out[r] += hsum(sum);
  }
}

// out[W lanes] += sums over everything.
__attribute__((noinline)) void strip_sum(float* out, const float* ds) {
  vf sum[4] = {};
  for (int i = 0; i < STRIP_SIZE; i += 4 * W)
    for (int j = 0; j < 4; j++) sum[j] += load(ds + i + j * W);
  store(out, load(out) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

// out[q - r + STRIP - 1] += ds of query q, key r: BLOCK_Q + STRIP entries, sums along the
// diagonals.
__attribute__((noinline)) void strip_distance_sums(float* out, const float* ds) {
  constexpr int LD = BLOCK_Q + 2 * STRIP;
  float skew[STRIP * LD];
  for (int r = 0; r < STRIP; r++) {
    float* row = skew + r * LD;
    for (int i = 0; i < STRIP; i += W) {
      store(row + i, vf{});
      store(row + STRIP + BLOCK_Q + i, vf{});
    }
    for (int i = 0; i < BLOCK_Q; i += W) store(row + STRIP + i, load(ds + r * BLOCK_Q + i));
  }
  for (int i = 0; i < BLOCK_Q + STRIP; i += W) {
    vf sum = vf{};
    for (int r = 0; r < STRIP; r++) sum += load(skew + r * LD + i + r + 1);
    store(out + i, load(out + i) + sum);
  }
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
