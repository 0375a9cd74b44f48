// What is added to the scaled, capped scores of a tile: ALiBi, a relative bias by distance and a
// mask, through one loader, in units of log2(e), -inf where hidden.
//
// A block stages what depends on the key alone (ALiBi, a mask per key, and that keys end at T) and
// what depends on the distance alone (the relative bias) in shared memory, once a tile; a mask per
// pair is read where it is needed.
#pragma once
#include "cuda/eight.h"
#include "cuda/tile/band.h"

namespace fasttx {

FASTTX_DEVICE float to_log2(float x) {
  const float y = x * LOG2E;
  return y == -INFINITY && x != -INFINITY ? LOWEST : y;
}
FASTTX_DEVICE float mask_value(const void* mask, int dtype, int64_t offset) {
  if (dtype == FASTTX_BOOL)
    return load(static_cast<const uint8_t*>(mask) + offset) ? 0.0f : -INFINITY;
  return to_log2(load1(mask, dtype, offset));
}

// One head's.
struct Bias {
  float slope;  // of ALiBi, in units of log2(e)
  const float* positions;
  int64_t position_step;
  int mask_kind, mask_dtype;
  const void* mask;
  int64_t mask_base, mask_row, mask_column;
  int table_dtype;
  const void* table;  // null: none
  int64_t table_base, table_step;
  const int32_t* lut;
  int64_t lut_step;
  int reach, origin;  // distance j - i - origin, clamped to +- reach
};

FASTTX_DEVICE Bias make_bias(const Attention& p, const Place& at) {
  const fasttx_attention& a = p.a;
  Bias b = {};
  b.mask_kind = p.mask;
  if (a.slopes.data) {
    const int last = static_cast<int>(a.slopes.sizes[0]) - 1;  // the tail of a packed batch
    b.slope = LOG2E * load(static_cast<const float*>(a.slopes.data) +
                           min(at.sequence, last) * a.slopes.strides[0] +
                           at.head * a.slopes.strides[1]);
    b.positions = static_cast<const float*>(a.positions.data);
    if (b.positions) b.positions += at.batch * a.positions.strides[0];
    b.position_step = a.positions.strides[1];
  }
  if (p.mask != NO_MASK) {
    b.mask = a.mask.data;
    b.mask_dtype = a.mask.dtype;
    b.mask_base = at.batch * a.mask.strides[0] + at.head * a.mask.strides[1];
    b.mask_row = a.mask.strides[2];
    b.mask_column = a.mask.strides[3];
  }
  if (a.table.data) {
    b.table = a.table.data;
    b.table_dtype = a.table.dtype;
    b.table_base = at.head * a.table.strides[1];
    b.table_step = a.table.strides[0];
    b.lut = static_cast<const int32_t*>(a.lut.data);
    b.lut_step = a.lut.strides[0];
    b.reach = static_cast<int>(a.lut.sizes[0] / 2);
    b.origin = at.T - at.S + static_cast<int>(a.bias_shift);
  }
  return b;
}

// Of query i and key j by their distance: the bucket, and its value.
FASTTX_DEVICE int bucket_of(const Bias& b, int distance) {
  return load(b.lut + (clamped(distance - b.origin, -b.reach, b.reach) + b.reach) * b.lut_step);
}
FASTTX_DEVICE float table_value(const Bias& b, int distance) {
  const int64_t offset = b.table_base + bucket_of(b, distance) * b.table_step;
  return LOG2E * load1(b.table, b.table_dtype, offset);
}

FASTTX_DEVICE float key_value(const Bias& b, const Place& at, int j) {
  if (j >= at.T) return -INFINITY;
  float x = b.slope;
  if (x != 0.0f) x *= b.positions ? load(b.positions + j * b.position_step) : static_cast<float>(j);
  if (b.mask_kind == MASK_KEYS) {
    const float m = mask_value(b.mask, b.mask_dtype, b.mask_base + j * b.mask_column);
    x = m == -INFINITY ? m : x + m;
  }
  return x;
}
FASTTX_DEVICE float pair_value(const Bias& b, const Place& at, int i, int j) {
  if (i >= at.S || j >= at.T) return -INFINITY;
  return mask_value(b.mask, b.mask_dtype, b.mask_base + i * b.mask_row + j * b.mask_column);
}

// In shared memory, for ROWS queries by KEYS keys.
template <int ROWS, int KEYS>
struct BiasTile {
  float key[KEYS];
  float distance[ROWS + KEYS];  // of (row r, key c) at c - r + ROWS - 1
};

// By all THREADS; a barrier before the tile is read, and before it is staged again.
template <int THREADS, int ROWS, int KEYS>
FASTTX_DEVICE void stage_bias(BiasTile<ROWS, KEYS>& tile, const Bias& b, const Place& at, int i0,
                              int j0, int thread) {
#pragma unroll
  for (int c = thread; c < KEYS; c += THREADS) tile.key[c] = key_value(b, at, j0 + c);
  if (b.table) {
#pragma unroll
    for (int x = thread; x < ROWS + KEYS - 1; x += THREADS)
      tile.distance[x] = table_value(b, j0 - i0 + x - (ROWS - 1));
  }
}

// The logit of the tile's row r and key c, from its scaled and capped score x. Selects, so that what
// is hidden is -inf whatever x is.
template <int ROWS, int KEYS>
FASTTX_DEVICE float biased(const BiasTile<ROWS, KEYS>& tile, const Bias& b, const Place& at, int i0,
                           int j0, float x, int r, int c) {
  float more = tile.key[c];
  if (b.table) more += tile.distance[c - r + ROWS - 1];
  if (b.mask_kind == MASK_PAIRS) {
    const float m = pair_value(b, at, i0 + r, j0 + c);
    more = m == -INFINITY ? m : more + m;
  }
  return more == -INFINITY ? more : x + more;
}

}  // namespace fasttx
