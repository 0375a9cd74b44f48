// What the attention backward of one query head works on: the task, its operands as they are
// packed, and the sums it gathers.
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

// A large lse has lost digits to rounding, all of them where a row only sees keys with a huge
// negative number in the mask, and exp(logit - lse) is as wrong as its last digit is large. Beyond
// this magnitude the probabilities of a row are summed once more; those of 16-bit inputs need no
// better.
FASTTX_INLINE float far_lse(int32_t dtype) { return dtype == FASTTX_F32 ? 32.0f : 1000.0f; }
FASTTX_INLINE bool is_far(float lse, float limit) {
  return (lse > limit && lse < 1e30f) || (lse < -limit && lse != -INF);
}

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
  int64_t keys_begin, keys_end;  // all that a key-padding mask shows lies inside
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
  side.keys_begin = 0;
  side.keys_end = h.T;
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
  // The gradient of the mask is written for every key.
  if (key_mask && !(p.need & NEED_DMASK)) {
    int64_t &begin = side.keys_begin, &end = side.keys_end;
    while (end > 0 && side.by_key[end - 1] == -INF) end--;
    while (begin < end && side.by_key[begin] == -INF) begin++;
    bool needed = begin % STRIP != 0;
    for (int64_t j = begin; j < end && !needed; j++) needed = side.by_key[j] != 0;
    side.has_key_bias = needed;
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
    far |= is_far(x, far_lse(h.q.dtype));
    large |= !(x < 1e30f) || !(delta[i] < 1e30f && delta[i] > -1e30f);
  }
  side.large[block] = large;
  side.far[block] = far;
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
