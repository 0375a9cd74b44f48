// Attention forward: O = dropout(softmax(logits)) V, one pass over the keys with a running maximum.
//
// Everything is transposed: lanes are queries, rows are keys. A block of NQ * W queries is packed
// once as Q^T; S^T = K Q^T and O^T = V^T P^T are then both "broadcast one number, multiply a vector
// of queries", and the softmax needs no horizontal operation. K is read as it lies in memory; bf16 V
// is interleaved by row pairs for vdpbf16ps. Without that instruction, and for fp16, K and V are
// converted to fp32 first.
#include <string.h>

#include "cpu/attention_fwd_product.h"

namespace fasttx::FASTTX_ISA {
namespace {

template <class E>
struct IsBf16 {
  static constexpr bool value = false;
};
template <>
struct IsBf16<bf16> {
  static constexpr bool value = true;
};

// K and V of one head, ready for the tiles. k[j * ldk + d]; v[j * ldv + d], or for PAIRS
// v[(j / 2 * ldv + d) * 2 + j % 2].
template <class KV>
struct Keys {
  const KV* k;
  const KV* v;
  int64_t ldk, ldv;
};

// Working memory of one query block.
struct Tile {
  vf* q;       // [D or D / 2][NQ]
  vf* o;       // [Dv][NQ]
  vf* s;       // [BLOCK][NQ] scores, SLACK rows around
  vf* p;       // [BLOCK / 2][NQ] pairs of probabilities; = s in fp32
  float* bias;              // memory of `built`,
  int64_t sequence, head;   // which is the bias of these
  Bias built;
};

// Hides the pairs beyond an edge of the band: rows [from, to) of one vector, whose first query is i
// rows below the first key.
FASTTX_INLINE void hide_edge(const Head& h, int64_t i, vf* s, int from, int to) {
  const int64_t far = 1 << 28;
  const vi row = lane_index() + (int)max64(-far, min64(far, i));
  const vi low = row + (int)max64(-2 * far, min64(2 * far, h.low));
  const vi high = row + (int)max64(-2 * far, min64(2 * far, h.high));
  for (int k = from; k < to; k++) {
    const vi key = set1i(k);
    s[k * NQ] = select(mask_or(less(key, low), less(high, key)), set1(-INF), s[k * NQ]);
  }
}

// ---- one block of queries ----

template <class E, bool PAIRS>
struct Forward {
  typedef typename Element<PAIRS>::type KV;
  static constexpr int G = PAIRS ? 2 : 1;

  FASTTX_NOINLINE static void query_block(const Problem& p, const Head& h, const Bias& b, const Keys<KV>& kv,
                          int64_t i0, const Tile& t) {
    const fasttx_attention& a = *p.a;
    const E* q = at<E>(a.q, h.batch, h.head, h.q0 + i0);
    const int64_t rows = min64(BQ, h.S - i0);
    if constexpr (PAIRS)
      pack_lanes_pairs<NQ>(q, a.q.strides[2], a.q.strides[3], rows, p.D, (vi*)t.q);
    else
      pack_lanes<NQ>(q, a.q.strides[2], a.q.strides[3], rows, p.D, t.q);
    const int64_t steps = (p.D + G - 1) / G;

    // Keys each vector of queries sees, and those all its lanes see.
    Range seen[NQ], full[NQ];
    int64_t begin = h.T, end = 0;
    for (int v = 0; v < NQ; v++) {
      const int64_t i = i0 + v * W, i_end = min64(i + W, h.S);
      seen[v] = full[v] = {0, 0};
      if (i >= h.S) continue;
      const Range r = visible_keys(h, i, i_end), c = common_keys(h, i, i_end);
      const Range shown = p.mask_per_pair ? mask_range(p, h, i, i_end - i) : b.keys;
      seen[v] = {max64(r.begin, shown.begin), min64(r.end, shown.end)};
      full[v] = {max64(c.begin, shown.begin), min64(c.end, shown.end)};
      if (seen[v].begin >= seen[v].end) continue;
      begin = min64(begin, seen[v].begin);
      end = max64(end, seen[v].end);
    }

    const bool plain = is_plain(p, b);
    const vf scale = set1(plain ? p.scale * LOG2E : 1.0f);
    vf m[NQ], l[NQ];
    for (int v = 0; v < NQ; v++) {
      m[v] = set1(-INF);
      l[v] = vf{};
    }
    bool started = false;
    for (int64_t j0 = begin / 8 * 8; j0 < end; j0 += BLOCK) {
      const int nk = (int)min64(BLOCK, end - j0);
      // Rows of the strip each vector sees, [first, last), and those without an edge of the band,
      // [inner, outer). What is inner for all vectors is done at once, the rest vector by vector.
      int first[NQ], last[NQ], inner[NQ], outer[NQ];
      int from = 0, to = nk;
      for (int v = 0; v < NQ; v++) {
        first[v] = (int)max64(0, min64(nk, seen[v].begin - j0));
        last[v] = (int)max64(first[v], min64(nk, seen[v].end - j0));
        inner[v] = (int)max64(first[v], min64(last[v], full[v].begin - j0));
        outer[v] = (int)max64(inner[v], min64(last[v], full[v].end - j0));
        from = inner[v] > from ? inner[v] : from;
        to = outer[v] < to ? outer[v] : to;
      }
      from = (from + G - 1) / G * G;
      if (to < nk) to = to / G * G;
      if (to - from < 4) from = to = 0;
      struct Segment {
        int v, from, to;  // rounded to G
      } segments[2 * NQ];
      int count = 0;
      for (int v = 0; v < NQ; v++) {
        const int low = first[v] / G * G, high = (last[v] + G - 1) / G * G;
        if (first[v] == last[v]) continue;
        if (from == to) {
          segments[count++] = {v, low, high};
          continue;
        }
        if (low < from) segments[count++] = {v, low, from};
        if (to < last[v]) segments[count++] = {v, to, high};
      }

      if (p.mask_per_pair) prefetch_mask(p, h, i0, rows, j0, nk);
      vf top[NQ];
      for (int v = 0; v < NQ; v++) top[v] = m[v];
      if (from < to)
        qk_strip<PAIRS, NQ, NK>(t.q, kv.k, kv.ldk, steps, t.s, j0, from, to, top);
      // Rows of the segments: stretches where the same vectors are wanted.
      for (int k = 0; count && k < nk;) {
        int next = nk, low = NQ, high = 0;
        for (int x = 0; x < count; x++) {
          const Segment& g = segments[x];
          if (k < g.from) {
            next = g.from < next ? g.from : next;
          } else if (k < g.to) {
            next = g.to < next ? g.to : next;
            low = g.v < low ? g.v : low;
            high = g.v + 1 > high ? g.v + 1 : high;
          }
        }
        if (low < high)
          qk_some<PAIRS>(high - low, t.q + low, kv.k, kv.ldk, steps, t.s + low, j0, k, next);
        k = next;
      }
      if (!plain) {
        for (int v = 0; v < NQ; v++) top[v] = m[v];
        apply_logits<NQ>(p, h, b, t.s, i0, j0, nk, nullptr, top, from, to);
      }
      if ((to - from) % G)
        for (int v = 0; v < NQ; v++) t.s[to * NQ + v] = set1(-INF);
      for (int x = 0; x < count; x++) {
        const Segment g = segments[x];
        const int v = g.v, begin = g.from > first[v] ? g.from : first[v];
        const int end = g.to < last[v] ? g.to : last[v];
        vf* y = t.s + v;
        for (int k = g.from; k < begin; k++) y[k * NQ] = set1(-INF);
        for (int k = end; k < g.to; k++) y[k * NQ] = set1(-INF);
        if (plain) {
          const int64_t i = i0 + v * W - j0;
          hide_edge(h, i, y, begin, end < inner[v] ? end : inner[v]);
          hide_edge(h, i, y, begin > outer[v] ? begin : outer[v], end);
        }
        vf even = top[v], odd = top[v];
        int k = begin;
        for (; k + 2 <= end; k += 2) {
          even = max(even, y[k * NQ]);
          odd = max(odd, y[(k + 1) * NQ]);
        }
        if (k < end) odd = max(odd, y[k * NQ]);
        top[v] = max(even, odd);
      }

      vf alpha[NQ], base[NQ];
      for (int v = 0; v < NQ; v++) {
        base[v] = select(equal(top[v], set1(-INF)), vf{}, top[v] * scale);
        alpha[v] = exp2<6>(fms(m[v], scale, base[v]));
        l[v] = l[v] * alpha[v];
        m[v] = top[v];
      }
      if (from < to) exp_rows<PAIRS, NQ>(t.s, t.p, from, to, scale, base, l);
      for (int x = 0; x < count; x++) {
        const Segment g = segments[x];
        exp_rows<PAIRS, 1>(t.s + g.v, t.p + g.v, g.from, g.to, scale, base + g.v, l + g.v);
      }
      if (p.dropout.threshold) {
        if constexpr (PAIRS)
          apply_dropout_pairs<NQ>(p, h, (vi*)t.p, i0, j0, nk);
        else
          apply_dropout<NQ>(p, h, t.p, i0, j0, nk);
      }

      if (!started && from == to)
        for (int64_t x = 0; x < p.Dv * NQ; x++) t.o[x] = vf{};
      if (from < to) {
        pv_strip<PAIRS, NQ, NK>(t.p + from / G * NQ, kv.v + (j0 + from) * kv.ldv, kv.ldv,
                                (to - from + G - 1) / G, p.Dv, t.o, started ? alpha : nullptr);
        for (int v = 0; v < NQ; v++) alpha[v] = set1(1.0f);
      }
      started = true;
      for (int x = 0; x < count; x++) {
        const Segment g = segments[x];
        pv_strip<PAIRS, 1, NK_ONE>(t.p + g.from / G * NQ + g.v, kv.v + (j0 + g.from) * kv.ldv,
                                   kv.ldv, (g.to - g.from) / G, p.Dv, t.o + g.v, alpha + g.v);
        alpha[g.v] = set1(1.0f);
      }
    }
    if (!started)
      for (int64_t x = 0; x < p.Dv * NQ; x++) t.o[x] = vf{};

    for (int v = 0; v * W < rows; v++) {
      const int n = (int)min64(W, rows - v * W);
      const vf scaled = set1(p.dropout.keep_scale) / l[v];
      const vf inverse = select(equal(l[v], vf{}), vf{}, scaled);
      // lse = maximum + ln(l) with one rounding at its size: the backward's probabilities are no
      // more exact than it is. l was summed relative to the rounded maximum * scale.
      const vf top = select(equal(m[v], set1(-INF)), vf{}, m[v]);
      const vf low = plain ? fnma(top, scale, top * scale) * LN2 : top * LN2_LOW;
      const vf lse = fma(top, set1(plain ? p.scale : LN2), fma(log2(l[v]), set1(LN2), low));
      store_strided(at<float>(a.lse, h.batch, h.head, h.q0 + i0 + v * W), a.lse.strides[2],
                    select(equal(top, set1(LOWEST)), top, lse), n);
      if (!store_rows(a, h, i0 + v * W, n, p.Dv, t.o + v, inverse, true))
        careful(p, h, b, i0 + v * W, n, t);
    }
  }


  // Writes n rows of O^T * inverse from row i; false if a value was not finite, which `expect_finite`
  // may then round wrongly.
  FASTTX_NOINLINE static bool store_rows(const fasttx_attention& a, const Head& h, int64_t i, int n, int64_t Dv,
                         const vf* o, vf inverse, bool expect_finite) {
    E* out = at<E>(a.out, h.batch, h.head, h.q0 + i);
    const int64_t row_stride = a.out.strides[2], column_stride = a.out.strides[3];
    // A sum is not finite where an element is not.
    const vi ones = set1i(0x3f803f80);
    vf sum = {};
    int64_t d = 0;
    if constexpr (IsBf16<E>::value) {
      for (; expect_finite && column_stride == 1 && d + 2 * W <= Dv; d += 2 * W) {
        vi t[W];
        FASTTX_UNROLL(16)
        for (int c = 0; c < W; c++) {
          const vf x = o[(d + 2 * c) * NQ] * inverse, y = o[(d + 2 * c + 1) * NQ] * inverse;
          t[c] = round_pair(x, y);
          sum = dpbf16(sum, t[c], ones);
        }
        transpose(t);
        for (int r = 0; r < n; r++) store_int(out + r * row_stride + d, t[r]);
      }
    }
    for (; d < Dv; d += W) {
      vf t[W];
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) {
        t[c] = d + c < Dv ? o[(d + c) * NQ] * inverse : vf{};
        sum += t[c];
      }
      transpose(t);
      const int columns = (int)min64(W, Dv - d);
      for (int r = 0; r < n; r++)
        store_strided(out + r * row_stride + d * column_stride, column_stride, t[r], columns);
    }
    return !any(not_finite(sum));
  }

  // The output of W rows again, where a NaN or infinity came out: it may stem from a hidden row of V,
  // so this time nothing hidden or dropped is multiplied. lse is right already: scores are selected.
  FASTTX_NOINLINE static void careful(const Problem& p, const Head& h, const Bias& b, int64_t i, int n,
                      const Tile& t) {
    const fasttx_attention& a = *p.a;
    vf* q = t.q;
    vf* o = t.o;  // stride NQ as in query_block
    vf* s = t.s;
    pack_lanes<1>(at<E>(a.q, h.batch, h.head, h.q0 + i), a.q.strides[2], a.q.strides[3], n, p.D, q);
    for (int64_t d = 0; d < p.Dv; d++) o[d * NQ] = vf{};
    vf m = set1(-INF), l = {};
    Range keys = visible_keys(h, i, i + n);
    keys = {max64(keys.begin, b.keys.begin), min64(keys.end, b.keys.end)};
    for (int64_t j0 = keys.begin / 8 * 8; j0 < keys.end; j0 += 64) {
      const int nk = (int)min64(64, keys.end - j0);
      for (int k = 0; k < nk; k++) {
        const E* row = at<E>(a.k, h.batch, h.kv_head, h.k0 + j0 + k);
        vf sum = {};
        for (int64_t d = 0; d < p.D; d++)
          sum = fma(q[d], set1(to_float(row[d * a.k.strides[3]])), sum);
        s[k] = sum;
      }
      apply_logits<1>(p, h, b, s, i, j0, nk);
      vf top = m;
      vmask visible[64];
      for (int k = 0; k < nk; k++) {
        if (j0 + k < keys.begin) s[k] = set1(-INF);
        visible[k] = mask_not(equal(s[k], set1(-INF)));
        top = max(s[k], top);
      }
      const vf base = select(equal(top, set1(-INF)), vf{}, top);
      const vf alpha = exp2<6>(m - base);
      for (int64_t d = 0; d < p.Dv; d++) o[d * NQ] = o[d * NQ] * alpha;
      l = l * alpha;
      m = top;
      for (int k = 0; k < nk; k++) {
        s[k] = exp2<6>(s[k] - base);
        l += s[k];
      }
      if (p.dropout.threshold) {
        vf kept[64];
        for (int k = 0; k < nk; k++) kept[k] = set1(1.0f);
        apply_dropout<1>(p, h, kept, i, j0, nk);
        for (int k = 0; k < nk; k++) visible[k] = mask_and(visible[k], less(vf{}, kept[k]));
      }
      for (int k = 0; k < nk; k++) {
        if (!any(visible[k])) continue;
        const E* row = at<E>(a.v, h.batch, h.kv_head, h.k0 + j0 + k);
        for (int64_t d = 0; d < p.Dv; d++) {
          const vf sum = fma(s[k], set1(to_float(row[d * a.v.strides[3]])), o[d * NQ]);
          o[d * NQ] = select(visible[k], sum, o[d * NQ]);
        }
      }
    }
    const vf inverse = select(equal(l, vf{}), vf{}, set1(p.dropout.keep_scale) / l);
    store_rows(a, h, i, n, p.Dv, o, inverse, false);
  }

  // ---- all of it ----

  static void prefetch_rows(const fasttx_tensor& x, const E* first, int64_t rows) {
    const char* p = (const char*)first;
    const int64_t width = x.sizes[3] * sizeof(E), stride = x.strides[2] * sizeof(E);
    if (stride_of(x, 3) != 1) return;
    for (int64_t r = 0; r < rows; r++, p += stride)
      for (int64_t c = 0; c < width; c += 64) __builtin_prefetch(p + c, 0, 2);
  }
  // Asks for the memory of the queries after block i0, and for this block's share of the next key
  // head, if short: otherwise short heads would wait for all of theirs.
  static void prefetch(const Problem& p, const Head& h, int64_t i0, int64_t next) {
    const fasttx_attention& a = *p.a;
    if (i0 + BQ < h.S)
      prefetch_rows(a.q, at<E>(a.q, h.batch, h.head, h.q0 + i0 + BQ), min64(BQ, h.S - i0 - BQ));
    const int64_t group = p.H / p.G;
    if (next >= p.sequences * p.G || (p.D + p.Dv) * h.T * (int64_t)sizeof(E) > 1 << 17) return;
    const Head n = make_head(p, next / p.G, next % p.G * group);
    if (i0 + BQ >= h.S && h.head % group == group - 1)
      prefetch_rows(a.q, at<E>(a.q, n.batch, n.head, n.q0), min64(BQ, n.S));
    const int64_t blocks = (h.S + BQ - 1) / BQ * group, block = i0 / BQ * group + h.head % group;
    const int64_t from = n.T * block / blocks, rows = n.T * (block + 1) / blocks - from;
    prefetch_rows(a.k, at<E>(a.k, n.batch, n.kv_head, n.k0 + from), rows);
    prefetch_rows(a.v, at<E>(a.v, n.batch, n.kv_head, n.k0 + from), rows);
  }

  static int64_t k_width(const Problem& p) { return round_up(p.D, G); }
  static bool packs_k(const Problem& p) {
    return !(sizeof(E) == sizeof(KV)) || stride_of(p.a->k, 3) != 1 || p.D % G || p.T < SHORT_KEYS ||
           p.packed;
  }
  static bool packs_v(const Problem& p) {
    return PAIRS || sizeof(E) != sizeof(KV) || stride_of(p.a->v, 3) != 1;
  }
  // Elements of the packed copies of keys [0, T) of one head; what follows each is readable.
  static int64_t elements(const Problem& p, int64_t T) {
    return (packs_k(p) ? (T + NK_ONE) * k_width(p) : 0) + (packs_v(p) ? (T + 1) * p.Dv : 0);
  }
  // Where those of a head begin when all heads share one buffer.
  static int64_t offset(const Problem& p, const Head& h) {
    const int64_t before = p.packed ? h.k0 : h.sequence * p.T;
    return p.G * (elements(p, before) + h.sequence * elements(p, 0)) + h.kv_head * elements(p, h.T);
  }

  static Keys<KV> keys_of(const Problem& p, const Head& h, const KV* memory) {
    const fasttx_attention& a = *p.a;
    Keys<KV> r = {at<KV>(a.k, h.batch, h.kv_head, h.k0), at<KV>(a.v, h.batch, h.kv_head, h.k0),
                  a.k.strides[2], a.v.strides[2]};
    if (packs_k(p)) {
      r.k = memory;
      r.ldk = k_width(p);
      memory += (h.T + NK_ONE) * r.ldk;
    }
    if (packs_v(p)) {
      r.v = memory;
      r.ldv = p.Dv;
    }
    return r;
  }
  // Copies K and V of one key head of one sequence where the tiles cannot read them in place.
  static Keys<KV> pack(const Problem& p, const Head& h, KV* memory) {
    const fasttx_attention& a = *p.a;
    const Keys<KV> r = keys_of(p, h, memory);
    if (packs_k(p)) {
      const E* k = at<E>(a.k, h.batch, h.kv_head, h.k0);
      copy(k, a.k.strides[2], a.k.strides[3], h.T, p.D, r.ldk, (KV*)r.k);
      memset((void*)(r.k + h.T * r.ldk), 0, NK_ONE * r.ldk * sizeof(KV));
    }
    if (packs_v(p)) {
      const E* v = at<E>(a.v, h.batch, h.kv_head, h.k0);
      if constexpr (PAIRS)
        pack_row_pairs(v, a.v.strides[2], a.v.strides[3], h.T, p.Dv, p.Dv, (KV*)r.v);
      else
        pack_rows(v, a.v.strides[2], a.v.strides[3], h.T, p.Dv, p.Dv, (KV*)r.v);
    }
    return r;
  }
  static void copy(const E* src, int64_t rs, int64_t cs, int64_t rows, int64_t D, int64_t width,
                   KV* to) {
    if constexpr (PAIRS)
      copy_rows(src, rs, cs, rows, D, width, to);
    else
      pack_rows(src, rs, cs, rows, D, width, to);
  }

  static int64_t tile_vectors(const Problem& p) {
    const int64_t q = round_up(p.D, 2 * W) * NQ, o = p.Dv * NQ;
    return q + o + (BLOCK + 2 * SLACK) * NQ + (PAIRS ? (BLOCK / 2 + SLACK) * NQ : 0);
  }
  // The calling thread's working memory, made at its first item.
  static bool make_tile(const Problem& p, Tile* t) {
    if (t->q) return true;
    const int64_t vectors = tile_vectors(p);
    vf* memory = (vf*)scratch(SCRATCH_TILE, vectors * sizeof(vf) + bias_floats(p) * sizeof(float));
    if (!memory) return false;
    t->q = memory;
    t->o = t->q + round_up(p.D, 2 * W) * NQ;
    t->s = t->o + p.Dv * NQ + SLACK * NQ;
    t->p = PAIRS ? t->s + (BLOCK + SLACK) * NQ : t->s;
    t->bias = (float*)(memory + vectors);
    t->sequence = t->head = -1;
    return true;
  }
  static const Bias& bias_of(const Problem& p, const Head& h, Tile* t) {
    if (t->sequence != h.sequence || t->head != h.head) {
      t->built = build_bias(p, h, t->bias);
      t->sequence = h.sequence;
      t->head = h.head;
    }
    return t->built;
  }

  static int run(const Problem& p) {
    const int64_t group = p.H / p.G, kv_heads = p.sequences * p.G, workers = num_workers();
    Tile* tiles = (Tile*)scratch(SCRATCH_HEAD, workers * sizeof(Tile));
    if (!tiles) return FASTTX_NO_MEMORY;
    memset((void*)tiles, 0, workers * sizeof(Tile));
    int status = FASTTX_OK;

    if (workers == 1 || kv_heads >= 4 * workers || kv_heads % workers == 0) {
      // One item a key head: K and V are packed by the worker that uses them.
      const size_t bytes = (elements(p, p.T) + 1) * sizeof(KV);
      parallel_items(kv_heads, workers, [&](int64_t worker, int64_t item) {
        Tile& t = tiles[worker];
        KV* memory = (KV*)scratch(SCRATCH_PACK, bytes);
        if (!memory || !make_tile(p, &t)) {
          __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
          return;
        }
        const int64_t sequence = item / p.G, first = item % p.G * group;
        const Keys<KV> kv = pack(p, make_head(p, sequence, first), memory);
        for (int64_t head = first; head < first + group; head++) {
          const Head h = make_head(p, sequence, head);
          const Bias& b = bias_of(p, h, &t);
          for (int64_t i0 = 0; i0 < h.S; i0 += BQ) {
            prefetch(p, h, i0, item + workers);
            query_block(p, h, b, kv, i0, t);
          }
        }
      });
      return status;
    }

    // Few heads: first all are packed, then one item is a block of queries, the last ones (long when
    // causal) first.
    const int64_t rows = p.sequences * p.H, blocks = (p.S + BQ - 1) / BQ;
    const Head last = make_head(p, p.sequences - 1, p.H - 1);
    const size_t bytes = (offset(p, last) + elements(p, last.T) + 1) * sizeof(KV);
    KV* memory = (KV*)scratch(SCRATCH_SHARED, bytes);
    if (!memory) return FASTTX_NO_MEMORY;
    if (packs_k(p) || packs_v(p))
      parallel_items(kv_heads, workers, [&](int64_t, int64_t item) {
        const Head h = make_head(p, item / p.G, item % p.G * group);
        pack(p, h, memory + offset(p, h));
      });
    parallel_items(rows * blocks, workers, [&](int64_t worker, int64_t item) {
      Tile& t = tiles[worker];
      if (!make_tile(p, &t)) {
        __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
        return;
      }
      const int64_t row = item / blocks, i0 = (blocks - 1 - item % blocks) * BQ;
      const Head h = make_head(p, row / p.H, row % p.H);
      if (i0 >= h.S) return;
      query_block(p, h, bias_of(p, h, &t), keys_of(p, h, memory + offset(p, h)), i0, t);
    });
    return status;
  }
};

// Rows that belong to no packed sequence.
template <class E>
void clear_rows(const Problem& p, int64_t begin, int64_t end) {
  const fasttx_attention& a = *p.a;
  for (int64_t h = 0; h < p.H; h++) {
    for (int64_t i = begin; i < end; i++) {
      E* out = at<E>(a.out, 0, h, i);
      for (int64_t d = 0; d < p.Dv; d++) from_float(0.0f, out + d * a.out.strides[3]);
      *at<float>(a.lse, 0, h, i) = -INF;
    }
  }
}

template <class E>
int forward(const Problem& p) {
  if (p.packed) {
    const int32_t* cu = (const int32_t*)p.a->cu_q.data;
    clear_rows<E>(p, 0, cu[0]);
    clear_rows<E>(p, cu[p.sequences], p.S);
  }
  return Forward<E, has_dpbf16 && IsBf16<E>::value>::run(p);
}

}  // namespace

int attention_fwd(const fasttx_attention& args) {
  Problem p = make_problem(args);
  if (p.mask_per_pair && args.mask.strides[2] == 0 && args.mask.sizes[3] == p.T) {
    p.mask_per_key = true;  // one row of a mask, expanded
    p.mask_per_pair = false;
  }
  if (p.B * p.H * p.S == 0) return FASTTX_OK;
  switch (args.q.dtype) {
    case FASTTX_F32:
      return forward<float>(p);
    case FASTTX_BF16:
      return forward<bf16>(p);
    case FASTTX_F16:
      return forward<f16>(p);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
