// What the kernels of attention_decode and cache_append share: the arguments on the device, the
// places of queries and of cached positions.
#pragma once
#include "cpu/attention_decode.h"
#include "cuda/eight.h"
#include "cuda/reduce.h"
#include "cuda/tile/softcap.h"

namespace fasttx {

struct Decode {
  fasttx_decode a;
  int H, G, S, T, D, Dv;
  int group;        // H / G
  int page, pages;  // page 0: the cache is in one piece
  int tiles;        // of 16 rows, group * S of them
  int splits;       // of the keys
  int left, right;  // -1: unbounded
  int reach;        // of the relative bias
  float scale, cap;  // logits in units of log2(e): scale q k^T, or cap tanh(scale q k^T)
  float* parts;      // [B * H * S, splits, width]: of each split, not normalized
  float* peaks;      // [B * H * S, splits]
  float* totals;     // [B * H * S, splits]
  float* diagonals;  // [H, 2 * reach + 1]: the relative bias by distance; or absent
  int width;         // Dv rounded up to eight
};

FASTTX_DEVICE int clamp(int x, int low, int high) { return max(low, min(x, high)); }

// Where position j of sequence b lies: its batch or page, its row there. owner -1: nowhere.
struct Slot {
  int owner, at;
};
FASTTX_DEVICE Slot slot_of(const Decode& p, int b, int j) {
  if (j < 0 || j >= p.T) return {-1, 0};
  if (!p.page) return {b, j};
  const fasttx_tensor& table = p.a.block_table;
  const int owner = load(static_cast<const int32_t*>(table.data) + b * table.strides[0] +
                         j / p.page * table.strides[1]);
  return {owner >= 0 && owner < p.pages ? owner : -1, j % p.page};
}
FASTTX_DEVICE int64_t slot_offset(const fasttx_tensor& cache, Slot slot, int g) {
  return slot.owner * cache.strides[0] + g * cache.strides[1] + slot.at * cache.strides[2];
}

// Row r of the group of heads that share a key and value head: one head's one query.
struct Query {
  int head, i;
  int low, high;  // the keys it sees
  int place;      // its position
  float slope;    // of ALiBi, in units of log2(e)
  int diagonal;  // of distance 0 among the diagonals
};
FASTTX_DEVICE Query query_of(const Decode& p, int b, int g, int r, int length) {
  Query q = {g * p.group, 0, p.T, 0, 0, 0.0f, 0};
  if (r >= p.group * p.S) return q;
  q.head += r / p.S;
  q.i = r % p.S;
  q.place = length - p.S + q.i;
  if (p.a.slopes.data) {
    const fasttx_tensor& slopes = p.a.slopes;
    const int64_t from = slopes.sizes[0] > 1 ? b * slopes.strides[0] : 0;
    q.slope =
        LOG2E * load(static_cast<const float*>(slopes.data) + from + q.head * slopes.strides[1]);
  }
  q.diagonal = q.head * (2 * p.reach + 1) + p.reach;
  if (q.place < 0) return q;
  q.low = 0;
  q.high = length;
  if (p.a.start.data)
    q.low = max(0, load(static_cast<const int32_t*>(p.a.start.data) + b * p.a.start.strides[0]));
  if (p.left >= 0) q.low = max(q.low, q.place - p.left);
  if (p.right >= 0) q.high = min(q.high, q.place + p.right + 1);
  return q;
}

// A logit from its product, in units of log2(e).
FASTTX_DEVICE float logit_of(const Decode& p, const Query& q, int b, int j, float product) {
  float x = product * p.scale;
  if (p.cap != 0.0f) x = p.cap * tanh_approx(x);
  if (p.a.positions.data) {
    const fasttx_tensor& positions = p.a.positions;
    const int64_t from = positions.sizes[0] > 1 ? b * positions.strides[0] : 0;
    x += q.slope *
         load(static_cast<const float*>(positions.data) + from + j * positions.strides[1]);
  } else if (p.a.slopes.data) {
    x += q.slope * static_cast<float>(j - q.place);
  }
  if (p.diagonals) x += load(p.diagonals + q.diagonal + clamp(j - q.place, -p.reach, p.reach));
  return x;
}

// Eight columns of a row, zeros beyond its width.
template <bool EVEN>
FASTTX_DEVICE Words load_columns(const fasttx_tensor& t, int64_t row, int column, int width) {
  Words words = {{0, 0, 0, 0}};
  const uint16_t* from = static_cast<const uint16_t*>(t.data) + row;
  if constexpr (EVEN) {
    if (column < width) words = load16(from + column);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (column + i < width)
        words.w[i / 2] |= static_cast<uint32_t>(load(from + (column + i) * t.strides[3]))
                          << 16 * (i % 2);
  }
  return words;
}

}  // namespace fasttx
