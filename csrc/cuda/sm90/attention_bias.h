// The bias of a warpgroup's 64 queries by KEYS keys, staged in shared memory while wgmma is under
// way.
#pragma once
#include "cuda/tile/bias.h"
#include "cuda/tile/softcap.h"

namespace fasttx {

template <int KEYS>
struct BiasOfGroup : BiasTile<64, KEYS> {
  float pairs[64 * KEYS];  // of a mask per pair
  // Eight rows of two columns meet all banks.
  static FASTTX_DEVICE int place(int row, int column) {
    return row * KEYS + (column ^ (row % 8 * 8));
  }
};

// What a block of keys takes of the tile; a bias that is one number for the block is `constant`.
struct BiasParts {
  bool keys, distances;
  float constant;
};
template <int KEYS>
FASTTX_DEVICE BiasParts parts_of(const Bias& bias, const Place& at, int i0, int j0) {
  const Attention& p = *bias.p;
  BiasParts parts = {p.a.slopes.data || p.mask == MASK_KEYS, false, 0.0f};
  if (p.a.table.data) {
    const int reach = static_cast<int>(p.a.lut.sizes[0] / 2);
    const int distance = j0 - i0 - (at.T - at.S + static_cast<int>(p.a.bias_shift));
    parts.distances = distance + KEYS - 1 > -reach && distance - 63 < reach;
    if (!parts.distances) parts.constant = table_value(bias, at, j0 - i0);
  }
  return parts;
}

// By the warpgroup's 128 threads; a barrier before the tile is read, and before it is staged again.
template <int KEYS>
FASTTX_DEVICE void stage_parts(BiasOfGroup<KEYS>& tile, const BiasParts& parts, const Bias& bias,
                               const Place& at, int i0, int j0, int thread) {
  if (parts.keys && thread < KEYS) tile.key[thread] = key_value(bias, at, j0 + thread);
  if (parts.distances)
    for (int x = thread; x < KEYS + 63; x += 128)
      tile.distance[x] = table_value(bias, at, j0 - i0 + x - 63);
  if (bias.p->mask == MASK_PAIRS) {
#pragma unroll 8
    for (int x = thread; x < 64 * KEYS; x += 128) {
      const int row = x / KEYS, column = x % KEYS;
      tile.pairs[tile.place(row, column)] = pair_value(bias, at, i0 + row, j0 + column);
    }
  }
}

// Products of rows row + 8 h, columns column + 8 n + e at s[4 n + 2 h + e] become logits, but for
// the band and the end of the keys. Selects, so that what is hidden is -inf whatever the product.
template <int KEYS>
FASTTX_DEVICE void add_parts(float (&s)[KEYS / 2], const BiasOfGroup<KEYS>& tile,
                             const BiasParts& parts, const Bias& bias, int row, int column) {
  const Attention& p = *bias.p;
  float scale = p.scale;
  if (p.cap != 0.0f) {
#pragma unroll
    for (int x = 0; x < KEYS / 2; x++) s[x] = score_of(p, s[x]);
    scale = 1.0f;
  }
  if (!parts.keys) {
#pragma unroll
    for (int x = 0; x < KEYS / 2; x++) s[x] = fmaf(s[x], scale, parts.constant);
  } else {
#pragma unroll
    for (int x = 0; x < KEYS / 2; x++) {
      const float more = tile.key[column + x / 4 * 8 + x % 2] + parts.constant;
      s[x] = more == -INFINITY ? more : fmaf(s[x], scale, more);
    }
  }
  if (parts.distances) {
    const float* distance = tile.distance + (column - row + 63);
#pragma unroll
    for (int x = 0; x < KEYS / 2; x++) s[x] += distance[x / 4 * 8 + x % 2 - x / 2 % 2 * 8];
  }
  if (p.mask == MASK_PAIRS) {
#pragma unroll
    for (int x = 0; x < KEYS / 2; x++) {
      const float more = tile.pairs[tile.place(row + x / 2 % 2 * 8, column + x / 4 * 8) + x % 2];
      s[x] = more == -INFINITY ? more : s[x] + more;
    }
  }
}

}  // namespace fasttx
