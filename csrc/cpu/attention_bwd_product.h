// The matrix products of the attention backward: strips of keys by blocks of queries.
#pragma once
#include "cpu/product.h"

namespace fasttx::FASTTX_ISA {
namespace {

// Queries of a block; a strip is STRIP keys.
constexpr int BLOCK_Q = 64;
constexpr int VECS = BLOCK_Q / W;
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
