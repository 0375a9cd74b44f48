// Which probabilities of a warp's tile dropout keeps: each Philox call is made by one lane, for
// eight keys of a row, and its bits are handed round.
#pragma once
#include "cuda/philox.h"

namespace fasttx {

// A warp's tile as mma and wgmma leave it, queries down: lane 4 g + t holds of the columns 8 n .. 8
// n + 7 rows g + 8 h, keys 8 n + 2 t + e.
template <int N>
struct KeepRows {
  static constexpr int WORDS = (N * 4 + 31) / 32;
  uint32_t bits[4][WORDS];

  // i: the query of row g = lane / 4; j: the first key, a multiple of 8.
  FASTTX_DEVICE void make(const Dropout& dropout, Key key, int i, int j, int head, int sequence) {
    static_assert(N % 4 == 0);
    const int lane = threadIdx.x % 32, t = lane % 4;
    uint32_t own[WORDS] = {};
#pragma unroll
    for (int x = 0; x < N / 2; x++) {  // 4 (x / 2) + t: the columns, x % 2: the rows
      const uint32_t eight =
          keep_bits(dropout, key, j / 8 + x / 2 * 4 + t, i + x % 2 * 8, head, sequence);
      own[x / 4] |= eight << x % 4 * 8;
    }
#pragma unroll
    for (int from = 0; from < 4; from++)
#pragma unroll
      for (int w = 0; w < WORDS; w++)
        bits[from][w] = __shfl_sync(~0u, own[w], (lane & ~3) + from) >> 2 * t;
  }
  FASTTX_DEVICE bool kept(int n, int h, int e) const {
    const int x = n / 4 * 2 + h;
    return bits[n % 4][x / 4] >> (x % 4 * 8 + e) & 1;
  }
};

// Keys down: lane 4 g + t holds of the columns 8 n .. 8 n + 7 keys g + 8 h, queries 8 n + 2 t + e.
template <int N>
struct KeepColumns {
  static constexpr int WORDS = (N * 4 + 31) / 32;
  uint32_t bits[2][2][2][WORDS];  // h, n % 2, e

  // i: the first query; j: the first of the 16 keys, a multiple of 8.
  FASTTX_DEVICE void make(const Dropout& dropout, Key key, int i, int j, int head, int sequence) {
    static_assert(N % 2 == 0);
    const int lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
    uint32_t own[WORDS] = {};
#pragma unroll
    for (int x = 0; x < N / 2; x++)
      own[x / 4] |=
          keep_bits(dropout, key, j / 8 + lane / 16, i + x * 16 + lane % 16, head, sequence)
          << x % 4 * 8;
#pragma unroll
    for (int from = 0; from < 8; from++)
#pragma unroll
      for (int w = 0; w < WORDS; w++)
        bits[from / 4][from / 2 % 2][from % 2][w] =
            __shfl_sync(~0u, own[w], from / 4 * 16 + from / 2 % 2 * 8 + 2 * t + from % 2) >> g;
  }
  FASTTX_DEVICE bool kept(int n, int h, int e) const {
    return bits[h][n % 2][e][n / 8] >> n / 2 % 4 * 8 & 1;
  }
};

}  // namespace fasttx
