// Rows, and keys, whose sums met NaN or infinity, once more: pair by pair in fp32, by one warp, so
// that what is hidden or dropped is not multiplied at all (0 * NaN is NaN). Slow, and rare.
#pragma once
#include "cuda/reduce.h"
#include "cuda/tile/bias.h"
#include "cuda/tile/softcap.h"

namespace fasttx {

FASTTX_DEVICE bool is_finite(float x) { return fabsf(x) < INFINITY; }

// The logit of one pair from its product q k^T; bend as in score_of.
FASTTX_DEVICE float logit_of(const Attention& p, const Bias& b, const Place& at, float product,
                             int i, int j, float& bend) {
  bend = 1.0f;
  if (!in_band(at, i, j)) return -INFINITY;
  float more = key_value(b, at, j);
  if (p.a.table.data) more += table_value(b, at, j - i);
  if (p.mask == MASK_PAIRS) {
    const float m = pair_value(b, at, i, j);
    more = m == -INFINITY ? m : more + m;
  }
  const float x = score_of(p, product, bend);
  return more == -INFINITY ? more : x + more;
}

FASTTX_DEVICE bool keeps(const Attention& p, Key key, const Place& at, int i, int j) {
  return keep_bits(p.dropout, key, j / 8, i, at.head, at.sequence) >> j % 8 & 1;
}

// Elements lane, lane + 32, .. of a row of at most 256 of a head's tensor, 0 beyond `width`.
FASTTX_DEVICE void load_lanes(float (&x)[8], const fasttx_tensor& t, int batch, int head, int row,
                              int width) {
  const auto* from = static_cast<const uint16_t*>(t.data) + rows_of(t, batch, head, row);
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const int d = threadIdx.x % 32 + 32 * c;
    x[c] = d < width ? unpack1(load(from + d * t.strides[3]), t.dtype) : 0.0f;
  }
}
FASTTX_DEVICE void store_lanes(const fasttx_tensor& t, int batch, int head, int row, int width,
                               const float (&x)[8], float factor) {
  auto* to = static_cast<uint16_t*>(t.data) + rows_of(t, batch, head, row);
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const int d = threadIdx.x % 32 + 32 * c;
    if (d < width) store(to + d * t.strides[3], pack1(x[c] * factor, t.dtype));
  }
}
FASTTX_DEVICE float dot_lanes(const float (&x)[8], const float (&y)[8]) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; c++) sum += x[c] * y[c];
  return warp_sum(sum);
}
FASTTX_DEVICE void add_lanes(float (&sum)[8], float factor, const float (&x)[8]) {
#pragma unroll
  for (int c = 0; c < 8; c++) sum[c] += factor * x[c];
}

// out of row i of a head, from its statistics in units of log2(e).
FASTTX_RARE inline void careful_out(const Attention& p, int sequence, int head, int i, float peak,
                                    float log_total) {
  const Place at = place_of(p, sequence, head);
  const fasttx_attention& a = p.a;
  const Bias b = make_bias(p, at);
  const Key key = load_key(p.dropout);
  float q[8], k[8], sum[8] = {}, bend;
  load_lanes(q, a.q, at.batch, at.head, at.row0 + i, p.D);
  const Range keys = visible_keys(at, i, 1);
  for (int j = keys.begin; j < keys.end; j++) {
    load_lanes(k, a.k, at.batch, at.kv_head, at.key0 + j, p.D);
    const float x = logit_of(p, b, at, dot_lanes(q, k), i, j, bend);
    if (x == -INFINITY || (p.dropout.threshold && !keeps(p, key, at, i, j))) continue;
    load_lanes(k, a.v, at.batch, at.kv_head, at.key0 + j, p.Dv);
    add_lanes(sum, exp2_approx(x - peak - log_total), k);
  }
  store_lanes(a.out, at.batch, at.head, at.row0 + i, p.Dv, sum, p.dropout.scale);
}

}  // namespace fasttx
