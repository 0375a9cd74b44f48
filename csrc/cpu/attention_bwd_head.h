// The attention backward of one query head: five products a block of keys x block of queries.
//   S^T = K Q^T, dP^T = V dO^T (lanes are queries), dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
#pragma once
#include "cpu/attention_bwd_operands.h"

namespace fasttx::FASTTX_ISA {
namespace {

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
  bias.band = key < last_query + h.low || key + STRIP - 1 > query + h.high ||
              key + STRIP > side.keys_end;
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
  bias.keys = (int32_t)side.keys_end;
  bias.low = h.low;
  bias.high = h.high;
  strip_logits(block.s, bias, p.scale, p.softcap, side.lse + query, block.caps, visible);
  return 1.0f;
}

// Keys of the block from `first` on that some query of a block sees, in strips: [from, to).
template <class U>
FASTTX_INLINE void strips_seen(const Task& h, const QuerySide<U>& side, int64_t query,
                               int64_t first, int64_t rows, int64_t* from, int64_t* to) {
  const int64_t last_query = min64(query + BLOCK_Q, h.S) - 1;
  const int64_t begin = max64(side.keys_begin, query + h.low);
  const int64_t end = min64(side.keys_end, last_query + h.high + 1);
  *from = max64(0, begin - first) / STRIP * STRIP;
  *to = min64(rows, round_up(max64(0, end - first), STRIP));
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
    strips_seen(h, side, query, first, round_up(n, STRIP), &from, &to);
    if (from >= to) continue;
    pack_operand<U>(block.keys, nullptr, ldk, h.k, first, n, round_up(n, STRIP), p.D);
    for (int64_t r = from; r < to; r += STRIP) {
      const float scale = strip_scores(p, h, side, block, query, first + r, r, block.visible);
      strip_probabilities<UnitF32>(block.s, block.s, scale, lse, nullptr, block.s);
      strip_query_sums(rest, block.s);
    }
  }
  for (int64_t i = 0; i < BLOCK_Q; i++)
    rest[i] = is_far(lse[i], far_lse(h.q.dtype)) ? __builtin_logf(rest[i]) : 0;
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
    strips_seen(h, side, query, first, rows, &from, &to);
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
