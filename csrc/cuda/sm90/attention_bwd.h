// What the kernels of attention's backward on sm_90 share: the call, the tiles and their place in
// shared memory.
//
//   zero      the counters and sums in global memory
//   main      a block a tile of KEYS keys of a key head, over the rows of all its query heads, in
//             order: dk, dv, and dq, of which each block adds its share onto fp32 sums
//   finish    dq from the sums; dmask and dtable from the blocks' shares, in a fixed order; and,
//             pair by pair, what is not finite
#pragma once
#include "cuda/sm90/heads.h"
#include "cuda/tile/bias.h"

namespace fasttx {

template <int D_>
struct BwdTile {
  static constexpr int D = D_, ROWS = D == 64 ? 128 : 64, KEYS = 128;
  static constexpr int K = KEYS * D * 2, Q = ROWS * D * 2, DS = KEYS * ROWS * 2, DQ = ROWS * D * 4;
};
constexpr int BWD_KEYS = 128, BWD_DQ = 8192;  // floats of a tile of dq
constexpr int BWD_BUCKETS = 256;              // of a table, at most
constexpr int ORDERED = 32;                   // in need: dq too in a fixed order

struct AttentionBwd {
  HeadsMap q, k, v, dout;
  Attention p;
  int row_tiles, key_tiles;  // of a head
  int rows;           // of a tile
  int* odd_keys;      // [B, G, key_tiles]: a gradient of a key is not finite
  int* odd_rows;      // [B, H, row_tiles]: one of a row is not
  int* ticket;        // ordered: which block is the next
  int* turns;         // ordered: [B, H, row_tiles] blocks that have added theirs
  float* dq;          // [B, H, row_tiles, BWD_DQ] as the accumulators lie, see at_dq
  float* key_sums;    // [B, H, T] of ds, for a mask per key; or null
  float* table_sums;  // [B, H, key_tiles, 8 warps, buckets] of ds; or null
  int64_t zero16;     // sixteens of bytes to be zeroed from odd_keys on
};

// Warpgroup w, thread i of it: accumulator 4 n + r of dq lies at at_dq + r.
FASTTX_DEVICE int at_dq(int warpgroup, int n, int thread) {
  return warpgroup * (BWD_DQ / 2) + n * 512 + thread * 4;
}

// A cudaError_t.
int attention_bwd_main_64_bf16(const AttentionBwd& c, bool general, void* stream);
int attention_bwd_main_64_f16(const AttentionBwd& c, bool general, void* stream);
int attention_bwd_main_128_bf16(const AttentionBwd& c, bool general, void* stream);
int attention_bwd_main_128_f16(const AttentionBwd& c, bool general, void* stream);
int attention_bwd_zero(const AttentionBwd& c, void* stream);
int attention_bwd_finish(const AttentionBwd& c, void* stream);

}  // namespace fasttx
