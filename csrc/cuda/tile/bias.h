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

// One head's. What the arguments say is read from them again: few registers live through a loop.
struct Bias {
  const Attention* p;
  float slope;  // of ALiBi, in units of log2(e)
};

FASTTX_DEVICE Bias make_bias(const Attention& p, const Place& at) {
  const fasttx_tensor& slopes = p.a.slopes;
  Bias b = {&p, 0.0f};
  if (slopes.data) {
    const int last = static_cast<int>(slopes.sizes[0]) - 1;  // the tail of a packed batch
    b.slope = LOG2E * load(static_cast<const float*>(slopes.data) +
                           min(at.sequence, last) * slopes.strides[0] +
                           at.head * slopes.strides[1]);
  }
  return b;
}

// The bucket of a distance j - i, and its value.
FASTTX_DEVICE int bucket_of(const Bias& b, const Place& at, int distance) {
  const fasttx_tensor& lut = b.p->a.lut;
  const int reach = static_cast<int>(lut.sizes[0] / 2);
  const int origin = at.T - at.S + static_cast<int>(b.p->a.bias_shift);
  return load(static_cast<const int32_t*>(lut.data) +
              (clamped(distance - origin, -reach, reach) + reach) * lut.strides[0]);
}
FASTTX_DEVICE float table_value(const Bias& b, const Place& at, int distance) {
  const fasttx_tensor& table = b.p->a.table;
  return LOG2E * load1(table.data, table.dtype,
                       bucket_of(b, at, distance) * table.strides[0] + at.head * table.strides[1]);
}

FASTTX_DEVICE int64_t mask_head(const Bias& b, const Place& at) {
  return at.batch * b.p->a.mask.strides[0] + at.head * b.p->a.mask.strides[1];
}
FASTTX_DEVICE float key_mask(const Bias& b, const Place& at, int j) {
  const fasttx_tensor& mask = b.p->a.mask;
  return mask_value(mask.data, mask.dtype, mask_head(b, at) + j * mask.strides[3]);
}
FASTTX_DEVICE float key_value(const Bias& b, const Place& at, int j) {
  if (j >= at.T) return -INFINITY;
  float x = b.slope;
  if (x != 0.0f) {
    const fasttx_tensor& positions = b.p->a.positions;
    x *= positions.data ? load(static_cast<const float*>(positions.data) +
                               at.batch * positions.strides[0] + j * positions.strides[1])
                        : static_cast<float>(j);
  }
  if (b.p->mask == MASK_KEYS) {
    const float m = key_mask(b, at, j);
    x = m == -INFINITY ? m : x + m;
  }
  return x;
}
FASTTX_DEVICE float pair_value(const Bias& b, const Place& at, int i, int j) {
  if (i >= at.S || j >= at.T) return -INFINITY;
  const fasttx_tensor& mask = b.p->a.mask;
  return mask_value(mask.data, mask.dtype,
                    mask_head(b, at) + i * mask.strides[2] + j * mask.strides[3]);
}

// A mask per key narrows the keys to those between the first and the last it shows. By a whole
// warp.
FASTTX_DEVICE Range shown_keys(const Bias& b, const Place& at, Range keys) {
  if (b.p->mask != MASK_KEYS) return keys;
  const int lane = threadIdx.x % 32;
  int begin = keys.end, end = keys.begin;
#pragma unroll 4
  for (int j = keys.begin + lane; j < keys.end; j += 32)
    if (key_mask(b, at, j) != -INFINITY) {
      begin = min(begin, j);
      end = j + 1;
    }
#pragma unroll
  for (int with = 16; with; with /= 2) {
    begin = min(begin, __shfl_xor_sync(~0u, begin, with));
    end = max(end, __shfl_xor_sync(~0u, end, with));
  }
  return {min(begin, end), end};
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
  if (b.p->a.table.data) {
#pragma unroll
    for (int x = thread; x < ROWS + KEYS - 1; x += THREADS)
      tile.distance[x] = table_value(b, at, j0 - i0 + x - (ROWS - 1));
  }
}

// What is added to the score of the tile's row r and key c, -inf where hidden.
template <int ROWS, int KEYS>
FASTTX_DEVICE float bias_at(const BiasTile<ROWS, KEYS>& tile, const Bias& b, const Place& at,
                            int i0, int j0, int r, int c) {
  float more = tile.key[c];
  if (b.p->a.table.data) more += tile.distance[c - r + ROWS - 1];
  if (b.p->mask == MASK_PAIRS) {
    const float m = pair_value(b, at, i0 + r, j0 + c);
    more = m == -INFINITY ? m : more + m;
  }
  return more;
}

// A warp's scores s[m][n][e] as mma and wgmma leave them become logits: the pair of query i and key
// j of the tile is row(m, h) + .. Selects, so that what is hidden is -inf whatever the score is.
// Queries down: rows row + 16 m + 8 (e / 2), keys column + 8 n + e % 2.
template <int ROWS, int KEYS, int M, int N>
FASTTX_DEVICE void add_bias(float (&s)[M][N][4], const BiasTile<ROWS, KEYS>& tile, const Bias& b,
                            const Place& at, int i0, int j0, int row, int column) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float more = tile.key[column + 8 * n + e];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 4; h += 2)
          s[m][n][h + e] = more == -INFINITY ? more : s[m][n][h + e] + more;
    }
  if (b.p->a.table.data) {
    const float* distance = tile.distance + (column - row + ROWS - 1);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[m][n][e] += distance[8 * n + e % 2 - 16 * m - 8 * (e / 2)];
  }
  if (b.p->mask == MASK_PAIRS) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float more = pair_value(b, at, i0 + row + 16 * m + 8 * (e / 2),
                                        j0 + column + 8 * n + e % 2);
          s[m][n][e] = more == -INFINITY ? more : s[m][n][e] + more;
        }
  }
}

}  // namespace fasttx
