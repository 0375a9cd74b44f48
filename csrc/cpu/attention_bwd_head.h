// The attention backward of one query head: five products a block of keys x block of queries.
//   S^T = K Q^T, dP^T = V dO^T (lanes are queries), dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
#pragma once
#include "cpu/attention.h"
#include "cpu/attention_bwd_strip.h"

namespace fasttx::FASTTX_ISA {
namespace {

enum Need { NEED_DQ = 1, NEED_DK = 2, NEED_DV = 4, NEED_DMASK = 8, NEED_DTABLE = 16 };

// How the gradient of the mask is gathered.
enum MaskGradient {
  MASK_NONE,
  MASK_WRITE,      // every element has one pair: written in the mask's dtype
  MASK_ADD,        // [S,T] summed over heads: added to fp32
  MASK_QUERY_SUM,  // [S,1]
  MASK_KEY_SUM,    // [1,T]
  MASK_SUM,        // [1,1]
};

// Relative position bias, the same for every head.
struct DistanceBias {
  const int32_t* lut;    // [2 * reach + 1] -> bucket, at distance + reach
  const int32_t* edges;  // edges[i] - edges[j]: how often lut changes between i and j
  int64_t reach, buckets;
  int32_t bucket(int64_t distance) const { return lut[index(distance)]; }
  int64_t index(int64_t distance) const { return max64(-reach, min64(reach, distance)) + reach; }
};

struct Task {
  Matrix q, k, v, out, dout, dq, dk, dv;
  Matrix mask;   // data null: none. row 0: the same for every query, then folded into the key bias
  Matrix dmask;  // of this head, for MASK_WRITE, and fp32 for the other kinds
  const float *lse, *dlse;
  int64_t lse_stride, dlse_stride;
  const float* positions;  // null: the key index
  int64_t positions_stride;
  const char* table;  // column of this head
  int64_t table_stride;
  int32_t table_dtype;
  float slope;
  bool alibi;
  float* bucket_sums;  // [buckets], for NEED_DTABLE
  int64_t S, T, index, batch;
  int64_t distance_shift;  // distance = key - query - distance_shift
  int32_t low, high;       // a pair is visible where query + low <= key <= query + high
};

struct Call {
  int64_t D, Dv;
  float scale, softcap;
  int need;
  MaskGradient mask_gradient;
  Dropout dropout;
  DistanceBias distance;
};

// Bump allocation over one buffer; with base = nullptr it only counts.
struct Arena {
  char* base;
  size_t used;
  template <class T = float>
  T* take(int64_t n) {
    T* p = base ? (T*)(base + used) : nullptr;
    used += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// A leading dimension in units: rows of the operands; in elements: rows of the fp32 sums.
template <class U>
constexpr int64_t units_of(int64_t columns) {
  return round_up((columns + U::PER_UNIT - 1) / U::PER_UNIT, W);
}
template <class U>
constexpr int64_t padded(int64_t columns) {
  return units_of<U>(columns) * U::PER_UNIT;
}

// A row that only sees keys with a huge negative number in the mask has an lse that rounding has
// made useless: exp(logit - lse) is as wrong as its last bit is large. Below this the probabilities
// are summed once more.
constexpr float FAR_LSE = -1000.0f;

// What depends on the head alone, shared by its key blocks.
template <class U>
struct QuerySide {
  float *queries_t, *douts_t;  // [blocks][units][BLOCK_Q]
  float *queries, *douts;      // [blocks][BLOCK_Q / PER_UNIT][padded columns]
  float *lse, *delta;          // [blocks * BLOCK_Q]
  float* lse_rest;             // of blocks that are `far`: what fp32 lse has lost
  float *by_key, *by_distance;
  uint8_t *large, *far;  // [blocks]
  int64_t blocks, padded_keys;
  bool large_bias, has_key_bias;

  void take(Arena& a, const Call& p, int64_t S, int64_t T) {
    blocks = (S + BLOCK_Q - 1) / BLOCK_Q;
    padded_keys = round_up(T, BLOCK_K<U>);
    const int64_t rows = blocks * BLOCK_Q, ldk = units_of<U>(p.D), ldv = units_of<U>(p.Dv);
    queries_t = a.take(rows * ldk);
    douts_t = a.take(rows * ldv);
    queries = a.take(rows * ldk);
    douts = a.take(rows * ldv);
    lse = a.take(rows);
    delta = a.take(rows);
    by_key = a.take(padded_keys);
    by_distance = a.take(p.distance.lut ? rows + padded_keys : 0);
    lse_rest = a.take(rows);
    large = a.take<uint8_t>(blocks);
    far = a.take<uint8_t>(blocks);
  }
};

// Sums over the keys of a head, gathered a key block at a time.
struct KeySums {
  float* dq;         // [blocks][padded columns][BLOCK_Q]
  uint8_t* touched;  // [blocks]: dq of the block holds something
  float* side;  // queries [rows], distances [rows + padded_keys + STRIP + BLOCK_Q], bucket_lanes
                // [buckets][W]
  float *queries, *distances, *bucket_lanes;
  int64_t side_size;

  template <class U>
  void take(Arena& a, const Call& p, int64_t S, int64_t T, bool with_dq) {
    const int64_t rows = round_up(S, BLOCK_Q), keys = round_up(T, BLOCK_K<U>);
    dq = with_dq ? a.take((p.need & NEED_DQ) ? rows * padded<U>(p.D) : 0) : nullptr;
    touched = with_dq ? a.take<uint8_t>(rows / BLOCK_Q) : nullptr;
    const bool by_query = p.mask_gradient == MASK_QUERY_SUM || p.mask_gradient == MASK_SUM;
    const bool table = p.need & NEED_DTABLE;
    const int64_t n = by_query ? rows : 0;
    const int64_t distances_size = table ? rows + keys + STRIP + BLOCK_Q : 0;
    side_size = round_up(n + distances_size + (table ? p.distance.buckets * W : 0), W);
    side = a.take(side_size);
    queries = side;
    distances = side + n;
    bucket_lanes = distances + distances_size;
  }
  void clear_side() { __builtin_memset(side, 0, side_size * sizeof(float)); }
  void add_side(const KeySums& part) {
    for (int64_t i = 0; i < side_size; i += W)
      store(side + i, load(side + i) + load(part.side + i));
  }
};

// One worker's memory for a key block.
template <class U>
struct KeySide {
  float *keys, *key_pairs, *values;  // [BLOCK_K][units], pairs [BLOCK_K / 2][2 * units]
  float *weights, *ds, *ds_pairs;    // [BLOCK_K][BLOCK_Q / PER_UNIT], pairs [BLOCK_K / 2][BLOCK_Q]
  float *careful_weights, *careful_ds;  // [BLOCK_K][BLOCK_Q] fp32
  int32_t* visible;                     // [BLOCK_K][BLOCK_Q]
  float *rows, *s, *dp, *keep, *mask, *caps, *key_sums;
  Prefetch prefetch;

  void take(Arena& a, const Call& p) {
    const int64_t ldk = units_of<U>(p.D), ldv = units_of<U>(p.Dv), n = BLOCK_K<U>;
    keys = a.take(n * ldk);
    key_pairs = U::PER_UNIT == 2 ? a.take(n * ldk) : keys;
    values = a.take(n * ldv);
    weights = a.take(n * BLOCK_Q / U::PER_UNIT);
    ds = a.take(n * BLOCK_Q / U::PER_UNIT);
    ds_pairs = U::PER_UNIT == 2 ? a.take(n * BLOCK_Q / 2) : ds;
    s = a.take(STRIP_SIZE);
    dp = a.take(STRIP_SIZE);
    keep = a.take(STRIP_SIZE);
    mask = a.take(STRIP_SIZE);
    caps = a.take(STRIP_SIZE);
    key_sums = a.take(n);
    rows = a.take(BLOCK_Q * (ldk > ldv ? ldk : ldv));
    visible = a.take<int32_t>(n * BLOCK_Q);
    careful_weights = U::PER_UNIT == 2 ? a.take(n * BLOCK_Q) : weights;
    careful_ds = U::PER_UNIT == 2 ? a.take(n * BLOCK_Q) : ds;
  }
};

// Biases of the head by key and by distance.
template <class U>
void pack_biases(const Call& p, const Task& h, QuerySide<U>& side) {
  const bool key_mask = h.mask.data && h.mask.row == 0;
  side.has_key_bias = h.alibi || key_mask;
  side.large_bias = false;
  if (side.has_key_bias) {
    vi top = vi{};
    for (int64_t j = 0; j < side.padded_keys; j++) {
      float x = 0;
      if (j < h.T) {
        if (h.alibi) x = h.slope * (h.positions ? h.positions[j * h.positions_stride] : (float)j);
        top = max_int(top, as_int(set1(x)) & 0x7fffffff);
        if (key_mask && h.mask.dtype == FASTTX_BOOL)
          x = h.mask.data[j * h.mask.column] ? x : -INF;
        else if (key_mask)
          with_type(h.mask.dtype, h.mask.data,
                    [&](auto* m) { x += to_float(m[j * h.mask.column]); });
      }
      side.by_key[j] = x;
    }
    side.large_bias = any_above(top, LARGE);
  }
  if (p.distance.lut) {
    vi top = vi{};
    const int64_t rows = side.blocks * BLOCK_Q, n = rows + side.padded_keys;
    with_type(h.table_dtype, (void*)h.table, [&](auto* column) {
      int64_t i = 0;
      while (i < n) {
        const int64_t distance = side.padded_keys - i - h.distance_shift;
        const int32_t bucket = p.distance.bucket(distance);
        const float x = to_float(column[bucket * h.table_stride]);
        top = max_int(top, as_int(set1(x)) & 0x7fffffff);
        side.by_distance[i++] = x;
      }
    });
    side.large_bias |= any_above(top, LARGE);
  }
}

template <class U>
void pack_query_block(const Call& p, const Task& h, QuerySide<U>& side, float* rows,
                      int64_t block) {
  const int64_t first = block * BLOCK_Q, n = min64(BLOCK_Q, h.S - first);
  const int64_t ldk = units_of<U>(p.D), ldv = units_of<U>(p.Dv);
  constexpr bool pairs = U::PER_UNIT == 2;
  float* natural = pairs ? rows : side.queries + first * ldk;
  bool large = pack_operand<U>(natural, (p.need & NEED_DK) ? side.queries + first * ldk : nullptr,
                               ldk, h.q, first, n, BLOCK_Q, p.D);
  transpose_rows(side.queries_t + first * ldk, natural, ldk);
  natural = pairs ? rows : side.douts + first * ldv;
  large |= pack_operand<U>(natural, (p.need & NEED_DV) ? side.douts + first * ldv : nullptr, ldv,
                           h.dout, first, n, BLOCK_Q, p.Dv);
  float *lse = side.lse + first, *delta = side.delta + first;
  bool far = false;
  if (p.need & ~NEED_DV) {
    transpose_rows(side.douts_t + first * ldv, natural, ldv);
    row_dots(delta, h.dout, h.out, first, n, p.Dv);
  }
  for (int64_t i = 0; i < BLOCK_Q; i++) {
    const float x = i < n ? h.lse[(first + i) * h.lse_stride] : -INF;
    lse[i] = x == -INF ? NO_ROW : x;
    if (!(p.need & ~NEED_DV) || x == -INF)
      delta[i] = 0;
    else if (h.dlse)
      delta[i] -= h.dlse[(first + i) * h.dlse_stride];
    far |= x < FAR_LSE && x != -INF;
    large |= !(x < 1e30f) || !(delta[i] < 1e30f && delta[i] > -1e30f);
  }
  side.large[block] = large;
  side.far[block] = far;
}

// Query blocks that see a key of [first, last).
FASTTX_INLINE void query_blocks(const Task& h, int64_t first, int64_t last, int64_t* begin,
                                int64_t* end) {
  const int64_t lowest = max64(0, first - h.high), highest = min64(h.S - 1, last - 1 - h.low);
  *begin = lowest / BLOCK_Q;
  *end = highest < lowest ? *begin : highest / BLOCK_Q + 1;
}

template <class U>
void distance_gradient(const Call& p, const Task& h, const KeySums& sums, int64_t padded_keys,
                       const float* ds, int64_t query, int64_t key) {
  const DistanceBias& d = p.distance;
  const int64_t nearest = key - query - h.distance_shift;
  const int64_t first = d.index(nearest - (BLOCK_Q - 1)), last = d.index(nearest + STRIP - 1);
  if (d.edges[first] == d.edges[last])
    strip_sum(sums.bucket_lanes + d.lut[first] * W, ds);
  else
    strip_distance_sums(sums.distances + query - key - (STRIP - 1) + padded_keys, ds);
}

// block.s = logits of a strip of keys and a block of queries up to the factor returned, and what is
// visible of them.
template <class U>
float strip_scores(const Call& p, const Task& h, const QuerySide<U>& side, KeySide<U>& block,
                   int64_t query, int64_t key, int64_t row, int32_t* visible) {
  const int64_t last_query = min64(query + BLOCK_Q, h.S) - 1, ldk = units_of<U>(p.D);
  strip_product<U>(block.s, block.keys + row * ldk, ldk, side.queries_t + query * ldk,
                   (p.D + U::PER_UNIT - 1) / U::PER_UNIT, used_vecs(h.S - query), block.prefetch);
  const bool mask = h.mask.data && h.mask.row != 0;
  StripBias bias = {};
  bias.band = key < last_query + h.low || key + STRIP - 1 > query + h.high || key + STRIP > h.T;
  if (side.has_key_bias) bias.by_key = side.by_key + key;
  if (p.distance.lut) bias.by_distance = side.by_distance + query - key + side.padded_keys;
  if (mask) {
    strip_mask(block.mask, h.mask, query, key, h.S, h.T);
    bias.mask = block.mask;
  }
  if (!bias.band && !bias.by_key && !bias.by_distance && !mask && !visible && p.softcap == 0)
    return p.scale;
  bias.query = (int32_t)query;
  bias.key = (int32_t)key;
  bias.keys = (int32_t)h.T;
  bias.low = h.low;
  bias.high = h.high;
  strip_logits(block.s, bias, p.scale, p.softcap, side.lse + query, block.caps, visible);
  return 1.0f;
}

// Keys of the block from `first` on that some query of a block sees, in strips: [from, to).
FASTTX_INLINE void strips_seen(const Task& h, int64_t query, int64_t first, int64_t rows,
                               int64_t* from, int64_t* to) {
  const int64_t last_query = min64(query + BLOCK_Q, h.S) - 1;
  *from = max64(0, query + h.low - first) / STRIP * STRIP;
  *to = min64(rows, round_up(max64(0, last_query + h.high + 1 - first), STRIP));
}

// lse_rest of a block of queries: log of the sum of exp(logit - lse).
template <class U>
void restore_lse(const Call& p, const Task& h, QuerySide<U>& side, KeySide<U>& block,
                 int64_t query_block) {
  if (!side.far[query_block]) return;
  const int64_t query = query_block * BLOCK_Q, ldk = units_of<U>(p.D);
  float *lse = side.lse + query, *rest = side.lse_rest + query;
  for (int64_t i = 0; i < BLOCK_Q; i++) rest[i] = 0;
  for (int64_t first = 0; first < h.T; first += BLOCK_K<U>) {
    const int64_t n = min64(BLOCK_K<U>, h.T - first);
    int64_t from, to;
    strips_seen(h, query, first, round_up(n, STRIP), &from, &to);
    if (from >= to) continue;
    pack_operand<U>(block.keys, nullptr, ldk, h.k, first, n, round_up(n, STRIP), p.D);
    for (int64_t r = from; r < to; r += STRIP) {
      const float scale = strip_scores(p, h, side, block, query, first + r, r, block.visible);
      strip_probabilities<UnitF32>(block.s, block.s, scale, lse, nullptr, block.s);
      strip_query_sums(rest, block.s);
    }
  }
  for (int64_t i = 0; i < BLOCK_Q; i++) rest[i] = lse[i] < FAR_LSE ? __builtin_logf(rest[i]) : 0;
}

// One strip of keys against one block of queries: weights and ds of the key block, and bias
// gradients.
template <class U>
void strip(const Call& p, const Task& h, const QuerySide<U>& side, KeySide<U>& block,
           const KeySums& sums, int64_t query_block, int64_t key, int64_t row, bool careful) {
  const int64_t query = query_block * BLOCK_Q, ldv = units_of<U>(p.Dv);
  constexpr bool pairs = U::PER_UNIT == 2;
  const float *lse = side.lse + query, *delta = side.delta + query;
  float* s = block.s;
  int32_t* visible = careful ? block.visible + row * BLOCK_Q : nullptr;
  float scale = strip_scores(p, h, side, block, query, key, row, visible);
  if (side.far[query_block]) {
    strip_subtract(s, scale, lse);
    lse = side.lse_rest + query;
    scale = 1;
  }

  const float* keep = nullptr;
  if (p.dropout.threshold) {
    strip_keep(block.keep, p.dropout, key, query, h.index, h.batch);
    keep = block.keep;
    if (careful) strip_drop(visible, keep);
  }
  float* weights = block.weights + row * BLOCK_Q / U::PER_UNIT;
  float* probabilities = pairs || keep ? s : weights;
  if (careful) {
    weights = block.careful_weights + row * BLOCK_Q;
    probabilities = keep ? s : weights;
    strip_probabilities<UnitF32>(probabilities, s, scale, lse, keep, weights);
  } else {
    strip_probabilities<U>(probabilities, s, scale, lse, keep, weights);
  }
  if (!(p.need & ~NEED_DV)) return;

  strip_product<U>(block.dp, block.values + row * ldv, ldv, side.douts_t + query * ldv,
                   (p.Dv + U::PER_UNIT - 1) / U::PER_UNIT, used_vecs(h.S - query), block.prefetch);
  float* by_query = block.ds + row * BLOCK_Q / U::PER_UNIT;
#if defined(__AVX512BF16__)
  float* by_key = block.ds_pairs + row * BLOCK_Q / 2;
  const bool bias_gradient = p.mask_gradient != MASK_NONE || (p.need & NEED_DTABLE);
  if constexpr (pairs) {
    if (!careful && !bias_gradient && !keep && p.softcap == 0) {
      strip_ds_rounded(by_query, by_key, probabilities, block.dp, delta);
      return;
    }
  }
#endif
  float* ds = careful ? block.careful_ds + row * BLOCK_Q : pairs ? block.dp : by_query;
  strip_ds(ds, probabilities, block.dp, delta, keep, visible);
  switch (p.mask_gradient) {
    case MASK_NONE:
      break;
    case MASK_WRITE:
      strip_mask_gradient(h.dmask, ds, query, key, h.S, h.T, false);
      break;
    case MASK_ADD:
      strip_mask_gradient(h.dmask, ds, query, key, h.S, h.T, true);
      break;
    case MASK_KEY_SUM:
      strip_key_sums(block.key_sums + row, ds);
      break;
    case MASK_QUERY_SUM:
    case MASK_SUM:
      strip_query_sums(sums.queries + query, ds);
      break;
  }
  if (p.need & NEED_DTABLE) distance_gradient<U>(p, h, sums, side.padded_keys, ds, query, key);
  if (p.softcap > 0) strip_uncap(ds, block.caps);
#if defined(__AVX512BF16__)
  if constexpr (pairs)
    if (!careful) round_strip(by_query, by_key, ds);
#endif
}

// Every query block against keys first .. first + BLOCK_K. dk, dv [BLOCK_K][padded columns] fp32
// are overwritten if `fresh`, else added to. sums.side is cleared first.
template <class U>
void key_block(const Call& p, const Task& h, const QuerySide<U>& side, KeySide<U>& block,
               KeySums& sums, int64_t first, float* dk, float* dv, bool fresh) {
  const int64_t n = min64(BLOCK_K<U>, h.T - first), rows = round_up(n, STRIP);
  const int64_t ldk = units_of<U>(p.D), ldv = units_of<U>(p.Dv);
  const int64_t columns = padded<U>(p.D), value_columns = padded<U>(p.Dv);
  const int64_t vecs = (p.D + W - 1) / W, value_vecs = (p.Dv + W - 1) / W;
  bool large = side.large_bias;
  large |= pack_operand<U>(block.keys, (p.need & NEED_DQ) ? block.key_pairs : nullptr, ldk, h.k,
                           first, n, rows, p.D);
  large |= pack_operand<U>(block.values, nullptr, ldv, h.v, first, n, rows, p.Dv);
  sums.clear_side();
  for (int64_t i = 0; i < rows; i++) block.key_sums[i] = 0;

  int64_t begin, end;
  query_blocks(h, first, first + n, &begin, &end);
  for (int64_t b = begin; b < end; b++) {
    const int64_t query = b * BLOCK_Q;
    int64_t from, to;
    strips_seen(h, query, first, rows, &from, &to);
    if (from >= to) continue;
    const bool careful = large || side.large[b];
    for (int64_t r = from; r < to; r += STRIP)
      strip(p, h, side, block, sums, b, first + r, r, careful);

    if (fresh && to - from < rows) {
      if (p.need & NEED_DK) __builtin_memset(dk, 0, rows * columns * sizeof(float));
      if (p.need & NEED_DV) __builtin_memset(dv, 0, rows * value_columns * sizeof(float));
      fresh = false;
    }
    const int used = used_vecs(h.S - query);
    const int64_t keys = to - from, at = from * BLOCK_Q;
    const float *queries = side.queries + query * ldk, *douts = side.douts + query * ldv;
    if (careful) {
      const int32_t* visible = block.visible + at;
      if (p.need & NEED_DV)
        add_keys_visible<U>(dv + from * value_columns, value_columns, block.careful_weights + at,
                            visible, SEEN, douts, keys, value_vecs, fresh);
      if (p.need & NEED_DK)
        add_keys_visible<U>(dk + from * columns, columns, block.careful_ds + at, visible, DROPPED,
                            queries, keys, vecs, fresh);
      if (p.need & NEED_DQ)
        add_queries_visible(sums.dq + query * columns, block.careful_ds + at, visible, keys, p.D,
                            !sums.touched[b], [&](int64_t r, int64_t d) {
                              const float* key = block.keys + (from + r) * ldk;
                              if constexpr (U::PER_UNIT == 2)
                                return to_float(((const bf16*)key)[d]);
                              return key[d];
                            });
    } else {
      if (p.need & NEED_DV)
        add_keys<U>(dv + from * value_columns, value_columns, block.weights + at / U::PER_UNIT,
                    douts, keys, value_vecs, used, fresh, block.prefetch);
      if (p.need & NEED_DK)
        add_keys<U>(dk + from * columns, columns, block.ds + at / U::PER_UNIT, queries, keys, vecs,
                    used, fresh, block.prefetch);
      if (p.need & NEED_DQ)
        add_queries<U>(sums.dq + query * columns, block.ds_pairs + at / U::PER_UNIT,
                       block.key_pairs + from * ldk, columns, keys, round_up(p.D, 2), used,
                       !sums.touched[b], block.prefetch);
    }
    fresh = false;
    if (sums.touched) sums.touched[b] = 1;
  }
  if (fresh) {
    if (p.need & NEED_DK) __builtin_memset(dk, 0, rows * columns * sizeof(float));
    if (p.need & NEED_DV) __builtin_memset(dv, 0, rows * value_columns * sizeof(float));
  }
  if (p.mask_gradient == MASK_KEY_SUM) {
    float* out = (float*)h.dmask.data + first;
    for (int64_t i = 0; i < n; i++) out[i] += block.key_sums[i];
  }
}

template <class U>
void store_keys(const Call& p, const Task& h, int64_t first, const float* dk, const float* dv) {
  const int64_t n = min64(BLOCK_K<U>, h.T - first);
  if (p.need & NEED_DK) store_rows(h.dk, first, n, p.D, dk, padded<U>(p.D), p.scale);
  if (p.need & NEED_DV) store_rows(h.dv, first, n, p.Dv, dv, padded<U>(p.Dv), 1.0f);
}

template <class U>
void store_queries(const Call& p, const Task& h, const KeySums& sums, int64_t block) {
  if (!(p.need & NEED_DQ)) return;
  const int64_t first = block * BLOCK_Q, n = min64(BLOCK_Q, h.S - first), columns = padded<U>(p.D);
  float* dq = sums.dq + first * columns;
  if (!sums.touched[block]) __builtin_memset(dq, 0, BLOCK_Q * columns * sizeof(float));
  store_transposed(h.dq, first, n, p.D, dq, p.scale);
}

// What the sums over the whole head give to the gradients of the biases.
inline void store_side_sums(const Call& p, const Task& h, const KeySums& sums,
                            int64_t padded_keys) {
  float* dmask = (float*)h.dmask.data;
  if (p.mask_gradient == MASK_QUERY_SUM)
    for (int64_t i = 0; i < h.S; i++) dmask[i] += sums.queries[i];
  if (p.mask_gradient == MASK_SUM) {
    float sum = 0;
    for (int64_t i = 0; i < h.S; i++) sum += sums.queries[i];
    dmask[0] += sum;
  }
  if (!(p.need & NEED_DTABLE)) return;
  for (int64_t i = 0; i < p.distance.buckets; i++)
    h.bucket_sums[i] = hsum(load(sums.bucket_lanes + i * W));
  // Entry i of distances is that of query - key + padded_keys = i.
  for (int64_t i = padded_keys - h.T + 1; i < padded_keys + h.S; i++)
    h.bucket_sums[p.distance.bucket(padded_keys - i - h.distance_shift)] += sums.distances[i];
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
