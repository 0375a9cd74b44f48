// What a warpgroup does with its pairs between the products, keys down: thread 32 w + 4 g + t holds
// at 4 n + 2 h + e key 16 w + g + 8 h and row 8 n + 2 t + e.
#pragma once
#include "cuda/sm90/attention_bwd_shared.h"
#include "cuda/tile/keep.h"
#include "cuda/tile/softcap.h"

namespace fasttx {

// One key tile's view of a tile of rows.
struct Pairs {
  int i0, j0;     // this thread's first row (2 t included) and key (g included)
  bool hides;     // the band, the ends or the keys may hide something
  float key[2];   // what is added for each key, -inf where hidden
  float far;      // the relative bias where one number serves the tile
  bool near;      // it does not
};

// Where a lane keeps softcap's derivative of two pairs, of word n / 2: in its warp's keys of ds.
FASTTX_DEVICE int at_bend(int n) { return n / 32 * (BWD_KEYS * 32) + n % 32 * 16; }

// Scores to probabilities.
template <int D, bool GENERAL>
FASTTX_DEVICE void probabilities(float (&s)[BwdTile<D>::ROWS / 2], const AttentionBwd& c,
                                 const Place& at, const BwdRows<D>& rows, const Pairs& x,
                                 uint32_t* bends) {
  constexpr int ROWS = BwdTile<D>::ROWS;
  const Attention& p = c.p;
  const int t2 = threadIdx.x % 4 * 2;
  float scale = p.scale;
  if constexpr (GENERAL) {
    if (p.cap != 0.0f) {
#pragma unroll
      for (int n = 0; n < ROWS / 2; n += 2) {
        const float a = tanh_approx(s[n] * scale), b = tanh_approx(s[n + 1] * scale);
        bends[at_bend(n)] = f16::pack(1.0f - a * a, 1.0f - b * b);
        s[n] = a * p.cap;
        s[n + 1] = b * p.cap;
      }
      scale = 1.0f;
    }
    const float far = x.near ? 0.0f : x.far;
    const float more[2] = {(x.key[0] == -INFINITY ? 0.0f : x.key[0]) + far,
                           (x.key[1] == -INFINITY ? 0.0f : x.key[1]) + far};
#pragma unroll
    for (int n = 0; n < ROWS / 2; n++) s[n] = s[n] * scale + more[n / 2 % 2];
    scale = 1.0f;
    if (x.near) {
      // Key 16 w + g, row 2 t of the tile.
      const float* distance = rows.distance + x.j0 - at.first + ROWS - 1 - t2;
#pragma unroll
      for (int n = 0; n < ROWS / 2; n++) s[n] += distance[n / 2 % 2 * 8 - n / 4 * 8 - n % 2];
    }
  }
  if (GENERAL && p.mask == MASK_PAIRS) {
    const Bias b = make_bias(p, at);
#pragma unroll
    for (int n = 0; n < ROWS / 2; n++) {
      const int i = x.i0 + n / 4 * 8 + n % 2, j = x.j0 + n / 2 % 2 * 8;
      float m = -INFINITY;
      if (in_band(at, i, j)) m = pair_value(b, at, i, j);
      s[n] = m == -INFINITY ? m : s[n] + m;
    }
  } else if (x.hides) {
#pragma unroll
    for (int n = 0; n < ROWS / 2; n++) {
      const int i = x.i0 + n / 4 * 8 + n % 2, j = x.j0 + n / 2 % 2 * 8;
      bool visible = i < at.S && in_band(at, i, j);
      if constexpr (GENERAL) visible &= x.key[n / 2 % 2] != -INFINITY;
      s[n] = visible ? s[n] * scale : -INFINITY;
    }
    scale = 1.0f;
  }
#pragma unroll
  for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float peak = rows.peak[8 * n + t2 + e];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float& y = s[4 * n + 2 * h + e];
        float z = y * scale - peak;
        if constexpr (GENERAL) z -= rows.log_total[8 * n + t2 + e];
        y = exp2_approx(z);
      }
    }
}

// p from probabilities and dp from its product: p to 16 bits, dp to ds.
template <class T, int D, bool GENERAL>
FASTTX_DEVICE void derivatives(float (&p)[BwdTile<D>::ROWS / 2], float (&dp)[BwdTile<D>::ROWS / 2],
                               uint32_t (&p16)[BwdTile<D>::ROWS / 16][4], const AttentionBwd& c,
                               const Place& at, const BwdRows<D>& rows, const Pairs& x) {
  constexpr int ROWS = BwdTile<D>::ROWS;
  const int t2 = threadIdx.x % 4 * 2;
  float kept = 1.0f;
  if constexpr (GENERAL) {
    const Dropout& dropout = c.p.dropout;
    if (dropout.threshold) {
      kept = dropout.scale;
      const Key key = load_key(dropout);
#pragma unroll
      for (int half = 0; half < ROWS / 64; half++) {
        KeepColumns<8> keep;
        keep.make(dropout, key, x.i0 - t2 + 64 * half, x.j0 - threadIdx.x % 32 / 4, at.head,
                  at.sequence);
#pragma unroll
        for (int n = 0; n < 32; n++) {
          // A probability that is dropped is negative from here on.
          float &y = p[32 * half + n], &d = dp[32 * half + n];
          const bool keeps = keep.kept(n / 4, n / 2 % 2, n % 2);
          y = keeps ? y : -y;
          d = keeps ? d * kept : 0.0f;
        }
      }
    }
  }
  const bool hides = GENERAL || x.hides;
#pragma unroll
  for (int n = 0; n < ROWS / 8; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float delta = rows.delta[8 * n + t2 + e];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float& d = dp[4 * n + 2 * h + e];
        const float y = p[4 * n + 2 * h + e];
        const float ds = fabsf(y) * (d - delta);
        d = hides && y == 0.0f ? 0.0f : ds;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float a = p[4 * n + 2 * h], b = p[4 * n + 2 * h + 1];
      if constexpr (GENERAL) {
        a = a < 0.0f ? 0.0f : a * kept;
        b = b < 0.0f ? 0.0f : b * kept;
      }
      p16[n / 2][n % 2 * 2 + h] = T::pack(a, b);
    }
  }
}

// Adds ds of a warp's 16 keys by ROWS rows to its sums of buckets.
template <int ROWS>
FASTTX_DEVICE void add_to_buckets(const float (&ds)[ROWS / 2], Diagonals& own, float* sums,
                                  const Bias& bias, const Place& at, int i, int j) {
  const int lane = threadIdx.x % 32, g = lane / 4, t2 = lane % 4 * 2;
  const int buckets = static_cast<int>(bias.p->a.table.sizes[0]);
#pragma unroll
  for (int part = 0; part < ROWS / 64; part++) {
    // Diagonal g - 8 u of the keys and of 8 rows, u = n - h.
#pragma unroll
    for (int u = -1; u < 8; u++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float sum = u >= 0 ? ds[32 * part + 4 * u + e] : 0.0f;
        if (u < 7) sum += ds[32 * part + 4 * (u + 1) + 2 + e];
        own.lines[t2 + e][g + 8 * (7 - u)] = sum;
      }
    __syncwarp();
    float sum[3];
    int bucket[3];
#pragma unroll
    for (int k = 0; k < 3; k++) {
      const int x = lane + 32 * k;  // distance + 63
      sum[k] = 0.0f;
#pragma unroll
      for (int line = 0; line < 8; line++) {
        const int place = x + line - 7;
        if (place >= 0 && place < 72) sum[k] += own.lines[line][place];
      }
      bucket[k] = x < Diagonals::COUNT ? bucket_of(bias, at, j - i - 64 * part + x - 63) : -1;
    }
    __syncwarp();
    float* totals = own.lines[0];
    int* numbers = reinterpret_cast<int*>(own.lines[4]);
#pragma unroll
    for (int k = 0; k < 3; k++) {
      totals[lane + 32 * k] = sum[k];
      numbers[lane + 32 * k] = bucket[k];
    }
    __syncwarp();
    for (int b = lane; b < buckets; b += 32) {
      float more = 0.0f;
      for (int x = 0; x < Diagonals::COUNT; x++) more += numbers[x] == b ? totals[x] : 0.0f;
      sums[b] += more;
    }
    __syncwarp();
  }
}

}  // namespace fasttx
