// What the attention forward and backward share: which pairs of a call are visible, and what is
// added to their scores.
#pragma once
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/vec.h"
#include "fasttx.h"

namespace fasttx::FASTTX_ISA {

int attention_fwd(const fasttx_attention& args);
int attention_bwd(const fasttx_attention& args);

namespace {

// Beyond the end of every array of Bias, readable.
constexpr int64_t BIAS_PAD = 512;

struct Problem {
  const fasttx_attention* a;
  int64_t B, H, G, S, T, D, Dv;
  int64_t sequences;  // B, or the number of packed sequences
  bool packed;
  bool mask_per_key;   // a mask of the form [B|1,H|1,1,T]: one number a key
  bool mask_per_pair;  // any other mask
  float scale, softcap;
  Dropout dropout;
};

// One (batch element or packed sequence, query head). Rows are counted inside the sequence.
struct Head {
  int64_t batch;     // index in dimension 0 of q, k, v, out and of mask, positions
  int64_t sequence;  // batch index of dropout and of slopes
  int64_t head, kv_head;
  int64_t q0, S;  // first query row in the tensors, and how many
  int64_t k0, T;  // first key row, and how many
  int64_t low, high;  // query i sees keys i + low <= j <= i + high
};

struct Range {
  int64_t begin, end;
};

inline int64_t stride_of(const fasttx_tensor& t, int dim) {
  return t.sizes[dim] == 1 ? 0 : t.strides[dim];
}
template <class T>
FASTTX_INLINE T* at(const fasttx_tensor& t, int64_t i0, int64_t i1, int64_t i2) {
  return (T*)t.data + i0 * t.strides[0] + i1 * t.strides[1] + i2 * t.strides[2];
}

inline Problem make_problem(const fasttx_attention& a) {
  Problem p = {};
  p.a = &a;
  p.B = a.q.sizes[0];
  p.H = a.q.sizes[1];
  p.S = a.q.sizes[2];
  p.D = a.q.sizes[3];
  p.G = a.k.sizes[1];
  p.T = a.k.sizes[2];
  p.Dv = a.v.sizes[3];
  p.packed = a.cu_q.data != nullptr;
  p.sequences = p.packed ? a.cu_q.sizes[0] - 1 : p.B;
  p.mask_per_key = a.mask.data && a.mask.sizes[2] == 1 && a.mask.sizes[3] == p.T;
  p.mask_per_pair = a.mask.data && !p.mask_per_key;
  p.scale = (float)a.scale;
  p.softcap = (float)a.softcap;
  p.dropout = make_dropout(a.seed.data ? a.dropout_p : 0.0, a.seed.data);
  return p;
}

inline Head make_head(const Problem& p, int64_t sequence, int64_t head) {
  const fasttx_attention& a = *p.a;
  Head h = {p.packed ? 0 : sequence, sequence, head, head / (p.H / p.G), 0, p.S, 0, p.T, 0, 0};
  if (p.packed) {
    const int32_t* q = (const int32_t*)a.cu_q.data;
    const int32_t* k = (const int32_t*)a.cu_k.data;
    h.q0 = q[sequence];
    h.S = q[sequence + 1] - h.q0;
    h.k0 = k[sequence];
    h.T = k[sequence + 1] - h.k0;
  }
  const int64_t unbounded = int64_t{1} << 40, offset = a.lower_right ? h.T - h.S : 0;
  h.low = a.left < 0 ? -unbounded : offset - a.left;
  h.high = a.right < 0 ? unbounded : offset + a.right;
  return h;
}

// Keys that at least one query of [i0, i1) sees by the band.
inline Range visible_keys(const Head& h, int64_t i0, int64_t i1) {
  Range r = {max64(0, i0 + h.low), min64(h.T, i1 + h.high)};
  if (r.end < r.begin) r.end = r.begin;
  return r;
}
// Keys that every query of [i0, i1) sees by the band: no edge falls inside.
inline Range common_keys(const Head& h, int64_t i0, int64_t i1) {
  return {max64(0, i1 - 1 + h.low), min64(h.T, i0 + h.high + 1)};
}
// Queries that see at least one key of [j0, j1) by the band.
inline Range visible_queries(const Head& h, int64_t j0, int64_t j1) {
  Range r = {max64(0, j0 - h.high), min64(h.S, j1 - h.low)};
  if (r.end < r.begin) r.end = r.begin;
  return r;
}
inline bool needs_band(const Head& h, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Range c = common_keys(h, i0, i1);
  return j0 < c.begin || j1 > c.end;
}

// What is added to the scaled, capped scores of one head besides a mask per pair; all in units of
// log2(e), built once per head in O(S + T).
struct Bias {
  Range keys;             // keys outside are hidden by the mask
  const float* key;       // [T] ALiBi and the mask per key, -inf where hidden; may be null
  const float* distance;  // relative bias of (i, j) at distance[i - j]; may be null. One unaligned
                          // load gives the W queries i, i + 1, ...
};

// Elements of the memory build_bias() needs; 0 when there is nothing to build.
inline int64_t bias_floats(const Problem& p) {
  return (p.mask_per_key || p.a->slopes.data ? p.T + BIAS_PAD : 0) +
         (p.a->table.data ? p.S + p.T + 2 * BIAS_PAD : 0);
}

// Additive masks in units of log2(e) and back. The finite minimum of a dtype stays finite.
constexpr float LOWEST = -3.4028234663852886e38f;
FASTTX_INLINE vf to_log2(vf x) {
  return select(equal(x, set1(-INF)), x, max(set1(LOWEST), x * set1(LOG2E)));
}
FASTTX_INLINE float to_log2(float x) {
  const float y = x * LOG2E;
  return x != -INF && y < LOWEST ? LOWEST : y;
}

// The element of a mask of any dtype as an additive number: 0 or -inf for a bool.
FASTTX_INLINE float mask_value(const fasttx_tensor& mask, int64_t offset) {
  switch (mask.dtype) {
    case FASTTX_BOOL:
      return ((const uint8_t*)mask.data)[offset] ? 0.0f : -INF;
    case FASTTX_BF16:
      return to_float(((const bf16*)mask.data)[offset]);
    case FASTTX_F16:
      return to_float(((const f16*)mask.data)[offset]);
    default:
      return ((const float*)mask.data)[offset];
  }
}
inline int64_t mask_offset(const Problem& p, const Head& h) {
  const fasttx_tensor& m = p.a->mask;
  return h.batch * stride_of(m, 0) + h.head * stride_of(m, 1);
}

FASTTX_NOINLINE inline Bias build_bias(const Problem& p, const Head& h, float* memory) {
  const fasttx_attention& a = *p.a;
  Bias b = {{0, h.T}, nullptr, nullptr};
  if (p.mask_per_key || a.slopes.data) {
    float* key = memory;
    memory += p.T + BIAS_PAD;
    bool needed = false;
    for (int64_t j = 0; j < h.T + BIAS_PAD; j++) key[j] = 0.0f;
    if (a.slopes.data) {
      needed = true;
      const float slope = ((const float*)a.slopes.data)[h.sequence * stride_of(a.slopes, 0) +
                                                        h.head * a.slopes.strides[1]];
      const float* positions = (const float*)a.positions.data;
      if (positions) positions += h.batch * stride_of(a.positions, 0);
      const int64_t stride = positions ? stride_of(a.positions, 1) : 0;
      for (int64_t j = 0; j < h.T; j++)
        key[j] = slope * (positions ? positions[j * stride] : (float)j) * LOG2E;
    }
    if (p.mask_per_key) {
      const int64_t base = mask_offset(p, h), stride = stride_of(a.mask, 3);
      b.keys = {h.T, 0};
      for (int64_t j = 0; j < h.T; j++) {
        const float m = mask_value(a.mask, base + j * stride);
        if (m != -INF) {
          b.keys.begin = min64(b.keys.begin, j);
          b.keys.end = j + 1;
        }
        needed = needed || (m != 0.0f && m != -INF);
        key[j] = m == -INF ? -INF : key[j] + to_log2(m);
      }
      if (b.keys.end < b.keys.begin) b.keys = {0, 0};
      for (int64_t j = b.keys.begin; j < b.keys.end && !needed; j++) needed = key[j] == -INF;
    }
    if (needed) b.key = key;
  }
  if (a.table.data) {
    float* distance = memory + h.T + BIAS_PAD;
    const int32_t* lut = (const int32_t*)a.lut.data;
    const int64_t M = a.lut.sizes[0] / 2, shift = h.T - h.S + a.bias_shift;
    const int64_t column = h.head * a.table.strides[1];
    for (int64_t x = 0; x < BIAS_PAD; x++) distance[-h.T - 1 - x] = distance[h.S + x] = 0.0f;
    for (int64_t x = -h.T; x < h.S; x++) {
      const int64_t d = max64(-M, min64(M, -x - shift));
      const int64_t element = lut[(d + M) * a.lut.strides[0]] * a.table.strides[0] + column;
      distance[x] = mask_value(a.table, element) * LOG2E;
    }
    b.distance = distance;
  }
  return b;
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA

#include "cpu/attention_logits.h"
#include "cpu/pack.h"
