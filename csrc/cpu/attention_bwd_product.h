// The one matrix product of the attention backward, a register tile of rows x vectors:
//   c[r][v] += sum over p of a[r * row + p * step] * b[p * width + v * W + lane]
// a is broadcast, b is read as vectors; both hold 32-bit units of the summed dimension.
#pragma once
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

// A unit is one fp32.
struct UnitF32 {
  static constexpr int PER_UNIT = 1;
  typedef vf vec;
  static FASTTX_INLINE vec row(const float* p) { return load(p); }
  static FASTTX_INLINE vec one(const float* p) { return broadcast(p); }
  static FASTTX_INLINE vf mac(vf c, vec a, vec b) { return fma(a, b, c); }
  // Element i of the summed dimension at W neighbours, of rows `width` units apart.
  static FASTTX_INLINE vf element(const float* b, int64_t width, int64_t i) {
    return load(b + i * width);
  }
};

// A unit is two bf16 that follow each other in the summed dimension.
struct UnitBF16 {
  static constexpr int PER_UNIT = 2;
  typedef vi vec;
  static FASTTX_INLINE vec row(const float* p) { return load_int(p); }
  static FASTTX_INLINE vec one(const float* p) { return broadcast_pair(p); }
  static FASTTX_INLINE vf mac(vf c, vec a, vec b) { return dpbf16(c, a, b); }
  static FASTTX_INLINE vf element(const float* b, int64_t width, int64_t i) {
    const vi pair = load_int(b + i / 2 * width);
    return i % 2 ? pair_high(pair) : pair_low(pair);
  }
};

// Queries of a block, keys of a strip, and the register tile: rows x vectors, of 32 registers with
// AVX-512 and of 16 without. A strip is a multiple of 8, of W and of TILE_ROWS.
constexpr int BLOCK_Q = 64, STRIP = W == 8 ? 24 : 16;
constexpr int VECS = BLOCK_Q / W;
constexpr int TILE_ROWS = W == 8 ? 6 : 4, TILE_VECS = W == 16 ? 4 : 2;
// Keys of a block: its operands stay in the first two cache levels.
template <class U>
constexpr int64_t BLOCK_K = U::PER_UNIT == 2 ? 256
                            : W == 8         ? 144
                                             : 128;

// Brings rows of the next small head into the cache, a few lines a register tile.
struct Prefetch {
  // Heads of more lines than this leave the second level cache before they are used.
  static constexpr int64_t MOST_LINES = 6144;
  struct Rows {
    const char* data;
    int64_t stride, rows, bytes;
  };
  Rows list[8];
  int count, current;
  int64_t row, at, lines, lines_a_tile;

  void add(const char* data, int64_t stride, int64_t rows, int64_t bytes) {
    if (!data || rows == 0 || bytes == 0) return;
    list[count++] = {data, stride, rows, bytes};
    lines += rows * ((bytes + 63) / 64);
  }
  void plan(int64_t tiles) {
    if (lines > MOST_LINES) count = 0;
    lines_a_tile = (lines + tiles - 1) / tiles;
  }
  FASTTX_INLINE void tile() {
    for (int64_t n = 0; current < count && n < lines_a_tile; n++) {
      const Rows& m = list[current];
      __builtin_prefetch(m.data + row * m.stride + at, 0, 2);
      at += 64;
      if (at < m.bytes) continue;
      at = 0;
      if (++row < m.rows) continue;
      row = 0;
      current++;
    }
  }
};

template <class U, int R, int V>
FASTTX_INLINE void product(vf (&c)[R][V], const float* a, int64_t row, int64_t step, const float* b,
                           int64_t width, int64_t units) {
  FASTTX_UNROLL(16)
  for (int r = 0; r < R; r++) FASTTX_UNROLL(4)
  for (int v = 0; v < V; v++) c[r][v] = vf{};
  FASTTX_UNROLL(2)
  for (int64_t p = 0; p < units; p++) {
    typename U::vec x[V];
    FASTTX_UNROLL(4)
    for (int v = 0; v < V; v++) x[v] = U::row(b + p * width + v * W);
    FASTTX_UNROLL(16)
    for (int r = 0; r < R; r++) {
      const typename U::vec y = U::one(a + r * row + p * step);
      FASTTX_UNROLL(4)
      for (int v = 0; v < V; v++) c[r][v] = U::mac(c[r][v], x[v], y);
    }
  }
}

// out [R][V vectors], `ld` floats apart: overwritten, or added to.
template <int R, int V>
FASTTX_INLINE void put(const vf (&c)[R][V], float* out, int64_t ld, bool overwrite) {
  if (overwrite) {
    FASTTX_UNROLL(16)
    for (int r = 0; r < R; r++) FASTTX_UNROLL(4)
    for (int v = 0; v < V; v++) store(out + r * ld + v * W, c[r][v]);
  } else {
    FASTTX_UNROLL(16)
    for (int r = 0; r < R; r++) FASTTX_UNROLL(4)
    for (int v = 0; v < V; v++) {
      float* p = out + r * ld + v * W;
      store(p, load(p) + c[r][v]);
    }
  }
}

// Of a block of queries the first `vecs` vectors are in use: a multiple of 2.
FASTTX_INLINE int used_vecs(int64_t queries) {
  return queries >= BLOCK_Q ? VECS : (int)round_up((queries + W - 1) / W, 2);
}

// s [STRIP][BLOCK_Q] = keys x queries: STRIP rows of `keys` with `units` units, queries
// [units][BLOCK_Q]; 0 where not in use. UNITS > 0 is a compile-time number of units.
template <class U, int UNITS>
FASTTX_INLINE void strip_product_n(float* s, const float* keys, int64_t ld, const float* queries,
                                   int64_t units, int vecs, Prefetch& prefetch) {
  if (UNITS > 0) ld = units = UNITS;
  int v = 0;
  for (; v + TILE_VECS <= vecs; v += TILE_VECS)
    for (int r = 0; r < STRIP; r += TILE_ROWS) {
      prefetch.tile();
      vf c[TILE_ROWS][TILE_VECS];
      product<U>(c, keys + r * ld, ld, 1, queries + v * W, BLOCK_Q, units);
      put(c, s + r * BLOCK_Q + v * W, BLOCK_Q, true);
    }
  if (TILE_VECS > 2 && v < vecs) {
    for (int r = 0; r < STRIP; r += 8) {
      vf c[8][2];
      product<U>(c, keys + r * ld, ld, 1, queries + v * W, BLOCK_Q, units);
      put(c, s + r * BLOCK_Q + v * W, BLOCK_Q, true);
    }
    v += 2;
  }
  for (; v < VECS; v++)
    for (int r = 0; r < STRIP; r++) store(s + r * BLOCK_Q + v * W, vf{});
}
template <class U>
__attribute__((noinline)) void strip_product(float* s, const float* keys, int64_t ld,
                                             const float* queries, int64_t units, int vecs,
                                             Prefetch& prefetch) {
  if (units == 64 / U::PER_UNIT && ld == units)
    strip_product_n<U, 64 / U::PER_UNIT>(s, keys, ld, queries, units, vecs, prefetch);
  else if (units == 128 / U::PER_UNIT && ld == units)
    strip_product_n<U, 128 / U::PER_UNIT>(s, keys, ld, queries, units, vecs, prefetch);
  else
    strip_product_n<U, 0>(s, keys, ld, queries, units, vecs, prefetch);
}

// out [keys][ld] (+)= weights [keys][BLOCK_Q] x rows [BLOCK_Q][ld], its first `columns` vectors;
// keys is a multiple of STRIP.
template <class U>
__attribute__((noinline)) void add_keys(float* out, int64_t ld, const float* weights,
                                        const float* rows, int64_t keys, int64_t columns, int vecs,
                                        bool overwrite, Prefetch& prefetch) {
  constexpr int UNITS = BLOCK_Q / U::PER_UNIT;
  const int64_t units = vecs * W / U::PER_UNIT;
  int64_t v = 0;
  for (; v + TILE_VECS <= columns; v += TILE_VECS)
    for (int64_t r = 0; r < keys; r += TILE_ROWS) {
      prefetch.tile();
      vf c[TILE_ROWS][TILE_VECS];
      product<U>(c, weights + r * UNITS, UNITS, 1, rows + v * W, ld, units);
      put(c, out + r * ld + v * W, ld, overwrite);
    }
  for (; v < columns; v++)
    for (int64_t r = 0; r < keys; r += 8) {
      vf c[8][1];
      product<U>(c, weights + r * UNITS, UNITS, 1, rows + v * W, ld, units);
      put(c, out + r * ld + v * W, ld, overwrite);
    }
}

// out [dims][BLOCK_Q] (+)= transposed rows [keys][ld] x weights [keys][BLOCK_Q], the vectors in
// use; dims is even, keys a multiple of STRIP.
template <class U, int R, int V>
FASTTX_INLINE void add_queries_n(float* out, const float* weights, const float* rows, int64_t ld,
                                 int64_t keys, int64_t dims, bool overwrite, Prefetch& prefetch) {
  int64_t d = 0;
  for (; d + R <= dims; d += R) {
    prefetch.tile();
    vf c[R][V];
    product<U>(c, rows + d, 1, ld, weights, BLOCK_Q, keys / U::PER_UNIT);
    put(c, out + d * BLOCK_Q, BLOCK_Q, overwrite);
  }
  for (; d < dims; d += 2) {
    vf c[2][V];
    product<U>(c, rows + d, 1, ld, weights, BLOCK_Q, keys / U::PER_UNIT);
    put(c, out + d * BLOCK_Q, BLOCK_Q, overwrite);
  }
}
template <class U>
__attribute__((noinline)) void add_queries(float* out, const float* weights, const float* rows,
                                           int64_t ld, int64_t keys, int64_t dims, int vecs,
                                           bool overwrite, Prefetch& prefetch) {
  int v = 0;
  for (; v + TILE_VECS <= vecs; v += TILE_VECS)
    add_queries_n<U, TILE_ROWS, TILE_VECS>(out + v * W, weights + v * W, rows, ld, keys, dims,
                                           overwrite, prefetch);
  if (TILE_VECS > 2 && v < vecs)
    add_queries_n<U, 8, 2>(out + v * W, weights + v * W, rows, ld, keys, dims, overwrite, prefetch);
}

// The same two sums where a non-finite row may meet the weight of a hidden pair: only the pairs
// whose entry of visible [keys][BLOCK_Q] has all bits of `wanted` are added. weights
// [keys][BLOCK_Q] fp32.
template <class U>
__attribute__((noinline)) void add_keys_visible(float* out, int64_t ld, const float* weights,
                                                const int32_t* visible, int32_t wanted,
                                                const float* rows, int64_t keys, int64_t vecs,
                                                bool overwrite) {
  for (int64_t r = 0; r < keys; r++) {
    if (overwrite)
      for (int64_t v = 0; v < vecs; v++) store(out + r * ld + v * W, vf{});
    for (int64_t i = 0; i < BLOCK_Q; i++) {
      if ((visible[r * BLOCK_Q + i] & wanted) != wanted) continue;
      const vf w = broadcast(weights + r * BLOCK_Q + i);
      for (int64_t v = 0; v < vecs; v++) {
        float* p = out + r * ld + v * W;
        store(p, fma(w, U::element(rows + v * W, ld, i), load(p)));
      }
    }
  }
}
// Here of all visible pairs. row(k, d) is element d of key k.
template <class Row>
FASTTX_INLINE void add_queries_visible(float* out, const float* weights, const int32_t* visible,
                                       int64_t keys, int64_t dims, bool overwrite, const Row& row) {
  if (overwrite)
    for (int64_t i = 0; i < dims * BLOCK_Q; i += W) store(out + i, vf{});
  for (int64_t r = 0; r < keys; r++)
    for (int v = 0; v < VECS; v++) {
      const vmask m = less(load_int(visible + r * BLOCK_Q + v * W), vi{});
      if (!any(m)) continue;
      const vf w = load(weights + r * BLOCK_Q + v * W);
      for (int64_t d = 0; d < dims; d++) {
        float* p = out + d * BLOCK_Q + v * W;
        const vf x = load(p);
        store(p, select(m, fma(w, set1(row(r, d)), x), x));
      }
    }
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
