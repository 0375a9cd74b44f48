// What the attention forward and backward share: which pairs of a call are visible, and the stage
// between the two products. Both work on strips of scores s[key][NQ vectors], lanes = queries, so
// every row statistic is a plain vector. Scores leave the stage multiplied by log2(e).
#pragma once
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/vec.h"
#include "fasttx.h"

namespace fasttx::FASTTX_ISA {

int attention_fwd(const fasttx_attention& args);
int attention_bwd(const fasttx_attention& args);

namespace {

// Beyond the end of every array of Bias, readable.
constexpr int64_t BIAS_PAD = 512;

struct Problem {
  const fasttx_attention* a;
  int64_t B, H, G, S, T, D, Dv;
  int64_t sequences;  // B, or the number of packed sequences
  bool packed;
  bool mask_per_key;   // a mask of the form [B|1,H|1,1,T]: one number a key
  bool mask_per_pair;  // any other mask
  float scale, softcap;
  Dropout dropout;
};

// One (batch element or packed sequence, query head). Rows are counted inside the sequence.
struct Head {
  int64_t batch;     // index in dimension 0 of q, k, v, out and of mask, positions
  int64_t sequence;  // batch index of dropout and of slopes
  int64_t head, kv_head;
  int64_t q0, S;  // first query row in the tensors, and how many
  int64_t k0, T;  // first key row, and how many
  int64_t low, high;  // query i sees keys i + low <= j <= i + high
};

struct Range {
  int64_t begin, end;
};

inline int64_t stride_of(const fasttx_tensor& t, int dim) {
  return t.sizes[dim] == 1 ? 0 : t.strides[dim];
}
template <class T>
FASTTX_INLINE T* at(const fasttx_tensor& t, int64_t i0, int64_t i1, int64_t i2) {
  return (T*)t.data + i0 * t.strides[0] + i1 * t.strides[1] + i2 * t.strides[2];
}

inline Problem make_problem(const fasttx_attention& a) {
  Problem p = {};
  p.a = &a;
  p.B = a.q.sizes[0];
  p.H = a.q.sizes[1];
  p.S = a.q.sizes[2];
  p.D = a.q.sizes[3];
  p.G = a.k.sizes[1];
  p.T = a.k.sizes[2];
  p.Dv = a.v.sizes[3];
  p.packed = a.cu_q.data != nullptr;
  p.sequences = p.packed ? a.cu_q.sizes[0] - 1 : p.B;
  p.mask_per_key = a.mask.data && a.mask.sizes[2] == 1 && a.mask.sizes[3] == p.T;
  p.mask_per_pair = a.mask.data && !p.mask_per_key;
  p.scale = (float)a.scale;
  p.softcap = (float)a.softcap;
  p.dropout = make_dropout(a.seed.data ? a.dropout_p : 0.0, a.seed.data);
  return p;
}

inline Head make_head(const Problem& p, int64_t sequence, int64_t head) {
  const fasttx_attention& a = *p.a;
  Head h = {p.packed ? 0 : sequence, sequence, head, head / (p.H / p.G), 0, p.S, 0, p.T, 0, 0};
  if (p.packed) {
    const int32_t* q = (const int32_t*)a.cu_q.data;
    const int32_t* k = (const int32_t*)a.cu_k.data;
    h.q0 = q[sequence];
    h.S = q[sequence + 1] - h.q0;
    h.k0 = k[sequence];
    h.T = k[sequence + 1] - h.k0;
  }
  const int64_t unbounded = int64_t{1} << 40, offset = a.lower_right ? h.T - h.S : 0;
  h.low = a.left < 0 ? -unbounded : offset - a.left;
  h.high = a.right < 0 ? unbounded : offset + a.right;
  return h;
}

// Keys that at least one query of [i0, i1) sees by the band.
inline Range visible_keys(const Head& h, int64_t i0, int64_t i1) {
  Range r = {max64(0, i0 + h.low), min64(h.T, i1 + h.high)};
  if (r.end < r.begin) r.end = r.begin;
  return r;
}
// Keys that every query of [i0, i1) sees by the band: no edge falls inside.
inline Range common_keys(const Head& h, int64_t i0, int64_t i1) {
  return {max64(0, i1 - 1 + h.low), min64(h.T, i0 + h.high + 1)};
}
// Queries that see at least one key of [j0, j1) by the band.
inline Range visible_queries(const Head& h, int64_t j0, int64_t j1) {
  Range r = {max64(0, j0 - h.high), min64(h.S, j1 - h.low)};
  if (r.end < r.begin) r.end = r.begin;
  return r;
}
inline bool needs_band(const Head& h, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Range c = common_keys(h, i0, i1);
  return j0 < c.begin || j1 > c.end;
}

// What is added to the scaled, capped scores of one head besides a mask per pair; all in units of
// log2(e), built once per head in O(S + T).
struct Bias {
  Range keys;             // keys outside are hidden by the mask
  const float* key;       // [T] ALiBi and the mask per key, -inf where hidden; may be null
  const float* distance;  // relative bias of (i, j) at distance[i - j]; may be null. One unaligned
                          // load gives the W queries i, i + 1, ...
};

// Elements of the memory build_bias() needs; 0 when there is nothing to build.
inline int64_t bias_floats(const Problem& p) {
  return (p.mask_per_key || p.a->slopes.data ? p.T + BIAS_PAD : 0) +
         (p.a->table.data ? p.S + p.T + 2 * BIAS_PAD : 0);
}

// Additive masks in units of log2(e) and back. The finite minimum of a dtype stays finite.
constexpr float LOWEST = -3.4028234663852886e38f;
FASTTX_INLINE vf to_log2(vf x) {
  return select(equal(x, set1(-INF)), x, max(set1(LOWEST), x * set1(LOG2E)));
}
FASTTX_INLINE float to_log2(float x) {
  const float y = x * LOG2E;
  return x != -INF && y < LOWEST ? LOWEST : y;
}

// The element of a mask of any dtype as an additive number: 0 or -inf for a bool.
FASTTX_INLINE float mask_value(const fasttx_tensor& mask, int64_t offset) {
  switch (mask.dtype) {
    case FASTTX_BOOL:
      return ((const uint8_t*)mask.data)[offset] ? 0.0f : -INF;
    case FASTTX_BF16:
      return to_float(((const bf16*)mask.data)[offset]);
    case FASTTX_F16:
      return to_float(((const f16*)mask.data)[offset]);
    default:
      return ((const float*)mask.data)[offset];
  }
}
inline int64_t mask_offset(const Problem& p, const Head& h) {
  const fasttx_tensor& m = p.a->mask;
  return h.batch * stride_of(m, 0) + h.head * stride_of(m, 1);
}

FASTTX_NOINLINE inline Bias build_bias(const Problem& p, const Head& h, float* memory) {
  const fasttx_attention& a = *p.a;
  Bias b = {{0, h.T}, nullptr, nullptr};
  if (p.mask_per_key || a.slopes.data) {
    float* key = memory;
    memory += p.T + BIAS_PAD;
    bool needed = false;
    for (int64_t j = 0; j < h.T + BIAS_PAD; j++) key[j] = 0.0f;
    if (a.slopes.data) {
      needed = true;
      const float slope = ((const float*)a.slopes.data)[h.sequence * stride_of(a.slopes, 0) +
                                                        h.head * a.slopes.strides[1]];
      const float* positions = (const float*)a.positions.data;
      if (positions) positions += h.batch * stride_of(a.positions, 0);
      const int64_t stride = positions ? stride_of(a.positions, 1) : 0;
      for (int64_t j = 0; j < h.T; j++)
        key[j] = slope * (positions ? positions[j * stride] : (float)j) * LOG2E;
    }
    if (p.mask_per_key) {
      const int64_t base = mask_offset(p, h), stride = stride_of(a.mask, 3);
      b.keys = {h.T, 0};
      for (int64_t j = 0; j < h.T; j++) {
        const float m = mask_value(a.mask, base + j * stride);
        if (m != -INF) {
          b.keys.begin = min64(b.keys.begin, j);
          b.keys.end = j + 1;
        }
        needed = needed || (m != 0.0f && m != -INF);
        key[j] = m == -INF ? -INF : key[j] + to_log2(m);
      }
      if (b.keys.end < b.keys.begin) b.keys = {0, 0};
      for (int64_t j = b.keys.begin; j < b.keys.end && !needed; j++) needed = key[j] == -INF;
    }
    if (needed) b.key = key;
  }
  if (a.table.data) {
    float* distance = memory + h.T + BIAS_PAD;
    const int32_t* lut = (const int32_t*)a.lut.data;
    const int64_t M = a.lut.sizes[0] / 2, shift = h.T - h.S + a.bias_shift;
    const int64_t column = h.head * a.table.strides[1];
    for (int64_t x = 0; x < BIAS_PAD; x++) distance[-h.T - 1 - x] = distance[h.S + x] = 0.0f;
    for (int64_t x = -h.T; x < h.S; x++) {
      const int64_t d = max64(-M, min64(M, -x - shift));
      const int64_t element = lut[(d + M) * a.lut.strides[0]] * a.table.strides[0] + column;
      distance[x] = mask_value(a.table, element) * LOG2E;
    }
    b.distance = distance;
  }
  return b;
}

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

// ---- packing ----

// rows x D of src, transposed to out[d][NQ] with lanes = rows; rows beyond `rows` and columns up to
// round_up(D, W) are zero.
template <int NQ, class E>
FASTTX_NOINLINE void pack_lanes(const E* src, int64_t row_stride, int64_t column_stride, int64_t rows,
                       int64_t D, vf* out) {
  for (int v = 0; v < NQ; v++) {
    int64_t d = 0;
    for (; column_stride == 1 && (v + 1) * W <= rows && d + W <= D; d += W) {
      vf t[W];
      const E* p = src + v * W * row_stride + d;
      FASTTX_UNROLL(16)
      for (int r = 0; r < W; r++) t[r] = load(p + r * row_stride);
      transpose(t);
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) out[(d + c) * NQ + v] = t[c];
    }
    for (; d < D; d += W) {
      vf t[W];
      for (int r = 0; r < W; r++) {
        const int64_t row = v * W + r;
        t[r] = row < rows ? load_strided(src + row * row_stride + d * column_stride, column_stride,
                                         (int)min64(W, D - d))
                          : vf{};
      }
      transpose(t);
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) out[(d + c) * NQ + v] = t[c];
    }
  }
}
// The same as bf16 pairs out[d / 2][NQ]; columns up to round_up(D, 2 * W) are zero.
template <int NQ>
FASTTX_NOINLINE void pack_lanes_pairs(const bf16* src, int64_t row_stride, int64_t column_stride,
                             int64_t rows, int64_t D, vi* out) {
  for (int v = 0; v < NQ; v++) {
    int64_t d = 0;
    for (; column_stride == 1 && (v + 1) * W <= rows && d + 2 * W <= D; d += 2 * W) {
      vi t[W];
      const bf16* p = src + v * W * row_stride + d;
      FASTTX_UNROLL(16)
      for (int r = 0; r < W; r++) t[r] = load_int(p + r * row_stride);
      transpose(t);
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) out[(d / 2 + c) * NQ + v] = t[c];
    }
    for (; d < D; d += 2 * W) {
      vi t[W];
      for (int r = 0; r < W; r++) {
        const int64_t row = v * W + r;
        const bf16* p = src + row * row_stride + d * column_stride;
        if (row >= rows) {
          t[r] = vi{};
        } else if (column_stride == 1 && d + 2 * W <= D) {
          t[r] = load_int(p);
        } else {
          bf16 buffer[2 * W] = {};
          for (int c = 0; c < 2 * W && d + c < D; c++) buffer[c] = p[c * column_stride];
          t[r] = load_int(buffer);
        }
      }
      transpose(t);
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) out[(d / 2 + c) * NQ + v] = t[c];
    }
  }
}
// rows x D of src to fp32 rows out[row][width], zero from D to width.
template <class E>
inline void pack_rows(const E* src, int64_t row_stride, int64_t column_stride, int64_t rows,
                      int64_t D, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; r++) {
    const E* row = src + r * row_stride;
    float* to = out + r * width;
    int64_t d = 0;
    if (column_stride == 1)
      for (; d + W <= D; d += W) store(to + d, load(row + d));
    for (; d < D; d++) to[d] = to_float(row[d * column_stride]);
    for (; d < width; d++) to[d] = 0.0f;
  }
}
// rows x D of src to bf16 rows out[row][width], zero from D to width.
inline void copy_rows(const bf16* src, int64_t row_stride, int64_t column_stride, int64_t rows,
                      int64_t D, int64_t width, bf16* out) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t d = 0; d < D; d++) out[r * width + d] = src[r * row_stride + d * column_stride];
    for (int64_t d = D; d < width; d++) out[r * width + d].bits = 0;
  }
}
// rows x D of src, two rows interleaved: out[row / 2][width][2], zero from D to width and in the
// last row of an odd count.
inline void pack_row_pairs(const bf16* src, int64_t row_stride, int64_t column_stride, int64_t rows,
                           int64_t D, int64_t width, bf16* out) {
  for (int64_t r = 0; r < rows; r += 2) {
    const bf16* a = src + r * row_stride;
    const bf16* b = a + row_stride;
    uint16_t* to = (uint16_t*)out + r * width;
    const bool both = r + 1 < rows;
    int64_t d = 0;
#if FASTTX_AVX512
    if (column_stride == 1 && both) {
      const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      for (; d + 32 <= D; d += 32) {
        const __m512i x = _mm512_loadu_si512(a + d), y = _mm512_loadu_si512(b + d);
        _mm512_storeu_si512(to + 2 * d, _mm512_permutex2var_epi16(x, low, y));
        _mm512_storeu_si512(to + 2 * d + 32, _mm512_permutex2var_epi16(x, high, y));
      }
    }
#endif
    for (; d < D; d++) {
      to[2 * d] = a[d * column_stride].bits;
      to[2 * d + 1] = both ? b[d * column_stride].bits : 0;
    }
    for (; d < width; d++) to[2 * d] = to[2 * d + 1] = 0;
  }
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
