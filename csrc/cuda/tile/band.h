// Where a block works: a tile of one head of one batch element or packed sequence, and which of the
// other side's tiles it meets.
#pragma once
#include "cuda/attention.h"
#include "cuda/ptx/memory.h"

namespace fasttx {

// Rows and keys are counted within the sequence.
struct Place {
  int batch;     // in dimension 0 of the tensors, of the mask and of positions
  int sequence;  // the batch index of dropout and of slopes
  int head, kv_head;
  int row0, S;    // first query row in the tensors, and how many
  int key0, T;    // first key in the tensors, and how many
  int low, high;  // query i sees keys i + low .. i + high
  int first;      // the tile's first row (or key)
};

// Packed, tiles of BLOCK along one side: sequence s owns those from cu[s] / BLOCK + s on, enough
// for any lengths, so the host needs none of them. Number `sequences` is what lies beyond the last.
inline int64_t tile_count(int64_t length, int sequences, int block) {
  return sequences ? length / block + sequences + 1 : (length + block - 1) / block;
}

FASTTX_DEVICE int clamped(int x, int low, int high) { return max(low, min(x, high)); }

// A sequence (a batch element where nothing is packed) and a query head; of no tile.
FASTTX_DEVICE Place place_of(const Attention& p, int sequence, int head) {
  Place at = {sequence, sequence, head, head / p.group, 0, p.S, 0, p.T, -UNBOUNDED, UNBOUNDED, 0};
  if (p.sequences) {
    const auto* q = static_cast<const int32_t*>(p.a.cu_q.data);
    const auto* k = static_cast<const int32_t*>(p.a.cu_k.data);
    const bool last = sequence == p.sequences;
    at.batch = 0;
    at.row0 = clamped(q[sequence], 0, p.S);
    at.key0 = clamped(k[sequence], 0, p.T);
    at.S = (last ? p.S : clamped(q[sequence + 1], at.row0, p.S)) - at.row0;
    at.T = (last ? p.T : clamped(k[sequence + 1], at.key0, p.T)) - at.key0;
  }
  const int offset = p.a.lower_right ? at.T - at.S : 0;
  if (p.left != UNBOUNDED) at.low = offset - p.left;
  if (p.right != UNBOUNDED) at.high = offset + p.right;
  return at;
}

// BY_KEYS: the tile is of keys, `head` a key/value head; otherwise of rows, `head` a query head.
// Without a row of its own side in the tile, false.
template <bool BY_KEYS>
FASTTX_DEVICE bool make_place(const Attention& p, int tile, int head, int batch, int block,
                              Place& at) {
  int sequence = batch, begin = 0;
  if (p.sequences) {
    const auto* own = static_cast<const int32_t*>(BY_KEYS ? p.a.cu_k.data : p.a.cu_q.data);
    const int total = BY_KEYS ? p.T : p.S;
    int beyond = p.sequences + 1;  // own[s] / block + s <= tile < own[beyond] / block + beyond
    sequence = 0;
    while (beyond - sequence > 1) {
      const int middle = (sequence + beyond) / 2;
      if (clamped(own[middle], 0, total) / block + middle <= tile)
        sequence = middle;
      else
        beyond = middle;
    }
    begin = clamped(own[sequence], 0, total) / block + sequence;
  }
  at = place_of(p, sequence, BY_KEYS ? head * p.group : head);
  at.first = (tile - begin) * block;
  // Beyond the last sequence nothing sees anything.
  if (p.sequences && sequence == p.sequences) (BY_KEYS ? at.S : at.T) = 0;
  return at.first < (BY_KEYS ? at.T : at.S);
}

struct Range {
  int begin, end;
};
// Keys that some query of [i, i + rows) sees by the band, and those that every one of them sees.
FASTTX_DEVICE Range visible_keys(const Place& at, int i, int rows) {
  const int last = min(i + rows, at.S) - 1, begin = max(0, i + at.low);
  return {begin, max(begin, min(at.T, last + at.high + 1))};
}
FASTTX_DEVICE Range common_keys(const Place& at, int i, int rows) {
  const int last = min(i + rows, at.S) - 1, begin = max(0, last + at.low);
  return {begin, max(begin, min(at.T, i + at.high + 1))};
}
// Queries that see some key of [j, j + keys), and those that see every one of them.
FASTTX_DEVICE Range visible_queries(const Place& at, int j, int keys) {
  const int last = min(j + keys, at.T) - 1, begin = max(0, j - at.high);
  return {begin, max(begin, min(at.S, last - at.low + 1))};
}
FASTTX_DEVICE Range common_queries(const Place& at, int j, int keys) {
  const int last = min(j + keys, at.T) - 1, begin = max(0, last - at.high);
  return {begin, max(begin, min(at.S, j - at.low + 1))};
}
FASTTX_DEVICE bool in_band(const Place& at, int i, int j) {
  return j < at.T && j >= i + at.low && j <= i + at.high;
}

// The first element of a head's row (or key) 0.
FASTTX_DEVICE int64_t rows_of(const fasttx_tensor& t, int batch, int head, int first) {
  return batch * t.strides[0] + head * t.strides[1] + first * t.strides[2];
}
// Of lse, dlse [B, H, S] by strides, and of the [B, H, S] scratch.
FASTTX_DEVICE int64_t statistics_of(const Attention& p, const Place& at) {
  return (static_cast<int64_t>(at.batch) * p.H + at.head) * p.S + at.row0;
}

}  // namespace fasttx
