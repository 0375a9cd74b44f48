// The bias of a warpgroup's 64 queries by KEYS keys, staged in shared memory while wgmma is under
// way.
#pragma once
#include "cuda/tile/bias.h"

namespace fasttx {

template <int KEYS>
struct BiasOfGroup : BiasTile<64, KEYS> {
  float pairs[64 * KEYS];  // of a mask per pair
  // Eight rows of two columns meet all banks.
  static FASTTX_DEVICE int place(int row, int column) {
    return row * KEYS + (column ^ (row % 8 * 8));
  }
};

// By the warpgroup's 128 threads; a barrier before the tile is read, and before it is staged again.
template <int KEYS>
FASTTX_DEVICE void stage_tile(BiasOfGroup<KEYS>& tile, const Bias& bias, const Place& at, int i0,
                              int j0, int thread) {
  stage_bias<128>(tile, bias, at, i0, j0, thread);
  if (bias.p->mask != MASK_PAIRS) return;
#pragma unroll 8
  for (int x = thread; x < 64 * KEYS; x += 128) {
    const int row = x / KEYS, column = x % KEYS;
    tile.pairs[tile.place(row, column)] = pair_value(bias, at, i0 + row, j0 + column);
  }
}

// Scores of rows row + 8 h, columns column + 8 n + e at s[4 n + 2 h + e] become logits. Selects, so
// that what is hidden is -inf whatever the score is.
template <int KEYS>
FASTTX_DEVICE void add_tile(float (&s)[KEYS / 2], const BiasOfGroup<KEYS>& tile, const Bias& bias,
                            int row, int column) {
#pragma unroll
  for (int x = 0; x < KEYS / 2; x++) {
    const float more = tile.key[column + x / 4 * 8 + x % 2];
    s[x] = more == -INFINITY ? more : s[x] + more;
  }
  if (bias.p->a.table.data) {
    const float* distance = tile.distance + (column - row + 63);
#pragma unroll
    for (int x = 0; x < KEYS / 2; x++) s[x] += distance[x / 4 * 8 + x % 2 - x / 2 % 2 * 8];
  }
  if (bias.p->mask == MASK_PAIRS) {
#pragma unroll
    for (int x = 0; x < KEYS / 2; x++) {
      const float more = tile.pairs[tile.place(row + x / 2 % 2 * 8, column + x / 4 * 8) + x % 2];
      s[x] = more == -INFINITY ? more : s[x] + more;
    }
  }
}

}  // namespace fasttx
