// The shared memory of the backward's main kernel.
#pragma once
#include "cuda/sm90/attention_bwd.h"

namespace fasttx {

// Of the rows of a tile, and the relative bias of its distances.
template <int D>
struct alignas(16) BwdRows {
  static constexpr int ROWS = BwdTile<D>::ROWS;
  float peak[ROWS], log_total[ROWS], delta[ROWS];
  float distance[ROWS + BWD_KEYS];  // of row r, key c at c - r + ROWS - 1
};

// Of the keys of a tile.
struct BwdKeys {
  float value[BWD_KEYS];  // what is added for a key, -inf where it is hidden
  float sum[BWD_KEYS];    // of ds
};

// Sums of ds along the diagonals of 16 keys by 64 rows: rows c = 0 .. 7 modulo 8 in lines of their
// own, so that each number is written once, by one lane.
struct Diagonals {
  static constexpr int LINE = 76, COUNT = 79;  // COUNT distances
  float lines[8][LINE];
};

// Where things are, in bytes. For a table's gradient besides: a Diagonals for each of 8 warps and,
// last, a sum for each of its buckets.
template <int D>
struct BwdShared {
  using Tile = BwdTile<D>;
  static constexpr int K = 0, V = Tile::K, Q = 2 * Tile::K, DOUT = Q + 2 * Tile::Q;
  static constexpr int DS = DOUT + 2 * Tile::Q, DQ = DS + 2 * Tile::DS, ROWS = DQ + Tile::DQ;
  static constexpr int BARRIERS = ROWS + 2 * static_cast<int>(sizeof(BwdRows<D>));
  static constexpr int KEYS = BARRIERS + 256, BYTES = KEYS + static_cast<int>(sizeof(BwdKeys));
  static constexpr int DIAGONALS = BYTES;
  static constexpr int BUCKETS = DIAGONALS + 8 * static_cast<int>(sizeof(Diagonals));
};

// What a block goes through: its keys, and the tiles of rows that see them, once for each query
// head of the group.
struct BwdBlock {
  int number;
  Place at;  // of the first head
  int begin, end;
};

// 8 bytes each: mbarriers, and what all threads know of the block.
enum BwdBarrier {
  KV_FULL,
  Q_FULL,
  Q_EMPTY = Q_FULL + 2,
  DOUT_FULL = Q_EMPTY + 2,
  DOUT_EMPTY = DOUT_FULL + 2,
  ROWS_FULL = DOUT_EMPTY + 2,
  ROWS_EMPTY = ROWS_FULL + 2,
  DQ_FULL = ROWS_EMPTY + 2,
  DQ_EMPTY = DQ_FULL + 2,
  BLOCK = DQ_EMPTY + 2  // a BwdBlock
};

}  // namespace fasttx
