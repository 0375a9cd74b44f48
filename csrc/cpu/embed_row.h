// What embed's forward and backward share: the sum of the tables' rows as one fp32 row in the cache.
#pragma once
#include "cpu/embed.h"
#include "cpu/norm_row.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int AHEAD = 2;  // rows

struct Embedding {
  const fasttx_embed* a;
  int64_t M, N, padded;  // padded: N rounded up to what one call of Philox covers
  bool rms;
  Dropout dropout;
  Parameters p;
};

FASTTX_INLINE bool make_embedding(const fasttx_embed& a, Embedding* e) {
  e->a = &a;
  e->M = a.M;
  e->N = a.N;
  e->padded = round_up(a.N, 8 * W);
  e->rms = a.norm == 2;
  e->dropout = make_dropout(a.dropout_p, a.seed);
  if (!a.norm) return true;
  float* memory = (float*)scratch(SCRATCH_SHARED, 2 * e->padded * sizeof(float));
  if (!memory) return false;
  e->p.weight = parameter(a.norm_weight, a.N, memory, 1);
  e->p.bias = parameter(a.norm_bias, a.N, memory + e->padded, 0);
  return true;
}

FASTTX_INLINE int64_t id_of(const fasttx_embed& a, int table, int64_t m) {
  if (a.ids[table]) return a.ids[table][m];
  return table == FASTTX_POSITION ? a.start + m % a.S : 0;
}

// Rows of a large table lie anywhere in memory: ask for the token's row of row m ahead of its turn.
FASTTX_INLINE void prefetch_row(const Embedding& e, int64_t m) {
  const fasttx_rows& t = e.a->table[FASTTX_TOKEN];
  if (m >= e.M || t.column != 1) return;
  const int64_t id = id_of(*e.a, FASTTX_TOKEN, m), size = t.dtype == FASTTX_F32 ? 4 : 2;
  if (id < 0 || id >= e.a->rows[FASTTX_TOKEN]) return;
  const char* p = (const char*)t.data + id * t.stride[2] * size;
  for (int64_t i = 0; i < min64(e.N * size, 16384); i += 64) __builtin_prefetch(p + i);
}

template <class T, bool POSITION, bool SEGMENT>
FASTTX_INLINE float add_tables(const T* token, const T* position, const T* segment, float scale,
                               float* z, int64_t N) {
  const vf by = set1(scale);
  const int64_t whole = N / W * W;
  float tail = 0;
  if (whole < N) {
    const int live = (int)(N - whole);
    vf v = load_partial(token + whole, live) * by;
    if (POSITION) v += load_partial(position + whole, live);
    if (SEGMENT) v += load_partial(segment + whole, live);
    store(z + whole, v);
    tail = sum_lanes(v);
  }
  return tail + sum_over(whole, [&](int64_t n) {
    vf v = load(token + n) * by;
    if (POSITION) v += load(position + n);
    if (SEGMENT) v += load(segment + n);
    store(z + n, v);
    return v;
  });
}

// z = scale * token + position + segment of row m, NaN where an id is out of range; returns its sum.
FASTTX_INLINE float embed_row(const Embedding& e, int64_t m, float* z) {
  const fasttx_embed& a = *e.a;
  int64_t id[FASTTX_TABLES];
  bool same = true;
  for (int i = 0; i < FASTTX_TABLES; i++) {
    if (!a.table[i].data) continue;
    id[i] = id_of(a, i, m);
    same = same && a.table[i].column == 1 && a.table[i].dtype == a.table[0].dtype;
    if (id[i] >= 0 && id[i] < a.rows[i]) continue;
    for (int64_t n = 0; n < e.N; n += W) store(z + n, set1(__builtin_nanf("")));
    return __builtin_nanf("");
  }
  const fasttx_rows &token = a.table[0], &position = a.table[1], &segment = a.table[2];
  const float scale = (float)a.scale;
  float sum = 0;
  if (same) {
    with_type(token, [&](auto type) {
      typedef decltype(type) T;
      const T* t = row_at<T>(token, id[0]);
      const T* p = position.data ? row_at<T>(position, id[1]) : nullptr;
      const T* s = segment.data ? row_at<T>(segment, id[2]) : nullptr;
      if (p && s) sum = add_tables<T, true, true>(t, p, s, scale, z, e.N);
      else if (p) sum = add_tables<T, true, false>(t, p, s, scale, z, e.N);
      else if (s) sum = add_tables<T, false, true>(t, p, s, scale, z, e.N);
      else sum = add_tables<T, false, false>(t, p, s, scale, z, e.N);
    });
    return sum;
  }
  read_row<false>(token, id[0], e.N, z);
  for (int64_t n = 0; n < e.N; n += W) store(z + n, load(z + n) * set1(scale));
  if (position.data) read_row<true>(position, id[1], e.N, z);
  if (segment.data) read_row<true>(segment, id[2], e.N, z);
  return sum_over(e.N, [&](int64_t n) { return load(z + n); });
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
