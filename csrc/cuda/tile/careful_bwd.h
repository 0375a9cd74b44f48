// The gradients of one row, and of one key, that met NaN or infinity, once more: as careful.h.
#pragma once
#include "cuda/tile/careful.h"

namespace fasttx {

// One pair's probability, and the gradient of its score, from the rows q, dout and the keys k, v.
struct CarefulPair {
  float p;   // as it multiplies v: after dropout
  float ds;  // with the softcap's derivative
};
// False: hidden.
FASTTX_DEVICE bool careful_pair(const Attention& p, const Bias& b, Key key, const Place& at,
                                const float (&q)[8], const float (&dout)[8], const float (&k)[8],
                                const float (&v)[8], int i, int j, CarefulPair& pair) {
  float bend;
  const float x = logit_of(p, b, at, dot_lanes(q, k), i, j, bend);
  float dp = dot_lanes(dout, v);
  if (x == -INFINITY) return false;
  const int64_t row = statistics_of(p, at) + i;
  const float log_total = p.two_numbers ? load(p.log_total + row) : 0.0f;
  pair.p = exp2_approx(x - load(p.peak + row) - log_total);
  const bool dropped = p.dropout.threshold && !keeps(p, key, at, i, j);
  dp = dropped ? 0.0f : dp * p.dropout.scale;
  pair.ds = pair.p * (dp - load(p.delta + row)) * bend;
  pair.p = dropped ? 0.0f : pair.p * p.dropout.scale;
  return true;
}

// dq of row i.
FASTTX_DEVICE void careful_dq(const Attention& p, int sequence, int head, int i) {
  const Place at = place_of(p, sequence, head);
  const fasttx_attention& a = p.a;
  const Bias b = make_bias(p, at);
  const Key key = load_key(p.dropout);
  float q[8], dout[8], k[8], v[8], sum[8] = {};
  load_lanes(q, a.q, at.batch, at.head, at.row0 + i, p.D);
  load_lanes(dout, a.dout, at.batch, at.head, at.row0 + i, p.Dv);
  const Range keys = visible_keys(at, i, 1);
  for (int j = keys.begin; j < keys.end; j++) {
    load_lanes(k, a.k, at.batch, at.kv_head, at.key0 + j, p.D);
    load_lanes(v, a.v, at.batch, at.kv_head, at.key0 + j, p.Dv);
    CarefulPair pair;
    if (careful_pair(p, b, key, at, q, dout, k, v, i, j, pair)) add_lanes(sum, pair.ds, k);
  }
  store_lanes(a.dq, at.batch, at.head, at.row0 + i, p.D, sum, p.grad_scale);
}

// dk and dv of key j, where needed.
FASTTX_DEVICE void careful_key(const Attention& p, int sequence, int kv_head, int j) {
  const fasttx_attention& a = p.a;
  const Key key = load_key(p.dropout);
  Place at = place_of(p, sequence, kv_head * p.group);
  float q[8], dout[8], k[8], v[8], dk[8] = {}, dv[8] = {};
  load_lanes(k, a.k, at.batch, kv_head, at.key0 + j, p.D);
  load_lanes(v, a.v, at.batch, kv_head, at.key0 + j, p.Dv);
  const Range rows = visible_queries(at, j, 1);
  for (; at.head < (kv_head + 1) * p.group; at.head++) {
    const Bias b = make_bias(p, at);
    for (int i = rows.begin; i < rows.end; i++) {
      load_lanes(q, a.q, at.batch, at.head, at.row0 + i, p.D);
      load_lanes(dout, a.dout, at.batch, at.head, at.row0 + i, p.Dv);
      CarefulPair pair;
      if (!careful_pair(p, b, key, at, q, dout, k, v, i, j, pair)) continue;
      add_lanes(dk, pair.ds, q);
      if (!p.dropout.threshold || keeps(p, key, at, i, j)) add_lanes(dv, pair.p, dout);
    }
  }
  if (a.need & 2) store_lanes(a.dk, at.batch, kv_head, at.key0 + j, p.D, dk, p.grad_scale);
  if (a.need & 4) store_lanes(a.dv, at.batch, kv_head, at.key0 + j, p.Dv, dv, 1.0f);
}

}  // namespace fasttx
