// A matrix product as register tiles of rows x vectors:
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

// The register tile, of 32 registers with AVX-512 and of 16 without; a strip of rows is a multiple
// of 8, of W and of TILE_ROWS.
constexpr int TILE_ROWS = W == 8 ? 6 : 4, TILE_VECS = W == 16 ? 4 : 2;
constexpr int STRIP = W == 8 ? 24 : 16;

template <class U, int R, int V>
FASTTX_INLINE void add_product(vf (&c)[R][V], const float* a, int64_t row, int64_t step,
                               const float* b, int64_t width, int64_t units) {
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
template <class U, int R, int V>
FASTTX_INLINE void product(vf (&c)[R][V], const float* a, int64_t row, int64_t step, const float* b,
                           int64_t width, int64_t units) {
  FASTTX_UNROLL(16)
  for (int r = 0; r < R; r++) FASTTX_UNROLL(4)
  for (int v = 0; v < V; v++) c[r][v] = vf{};
  add_product<U>(c, a, row, step, b, width, units);
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

}  // namespace
}  // namespace fasttx::FASTTX_ISA
