// The two products of decoding on rows as they lie in the cache: dot products of one query with
// keys, and the sum of rows of values by their weights.
#pragma once
#include "cpu/vec.h"
#include "fasttx.h"

namespace fasttx::FASTTX_ISA {
namespace {

// What a query and its probabilities are kept as, the degree of their exponential, and the columns
// that rows are padded to.
template <class E>
struct Kept {
  using query = float;
  using weight = float;
  static constexpr int degree = 6;
  static constexpr int64_t columns = W;
};
#if defined(__AVX512BF16__)
template <>
struct Kept<bf16> {
  using query = bf16;
  using weight = bf16;
  static constexpr int degree = 3;
  static constexpr int64_t columns = 2 * W;
};
#endif

// Row j of W rows; beyond `n` the last one, unless FULL.
template <bool FULL, class E>
FASTTX_INLINE const E* row_of(const E* k, int64_t stride, int n, int j) {
  if constexpr (!FULL) return k + (j < n ? j : n - 1) * stride;
  return k + j / 4 * 4 * stride + j % 4 * stride;
}

template <bool FULL, class E>
FASTTX_INLINE vf dots(const float* q, const E* k, int64_t stride, int n, int64_t D) {
  vf c[W] = {};
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const vf x = load(q + d);
    FASTTX_UNROLL(16)
    for (int j = 0; j < W; j++) c[j] = fma(x, load(row_of<FULL>(k, stride, n, j) + d), c[j]);
  }
  if (d < D) {
    const vf x = load(q + d);
    FASTTX_UNROLL(16)
    for (int j = 0; j < W; j++)
      c[j] = fma(x, load_partial(row_of<FULL>(k, stride, n, j) + d, (int)(D - d)), c[j]);
  }
  return sum_lanes<W>(c);
}
#if defined(__AVX512BF16__)
FASTTX_INLINE vi load_words(const bf16* p, int64_t n) {
  return (vi)_mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffff : (1u << n) - 1, p);
}
template <bool FULL>
FASTTX_INLINE vf dots(const bf16* q, const bf16* k, int64_t stride, int n, int64_t D) {
  vf c[W] = {};
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    const vi x = load_int(q + d);
    FASTTX_UNROLL(16)
    for (int j = 0; j < W; j++)
      c[j] = dpbf16(c[j], x, load_int(row_of<FULL>(k, stride, n, j) + d));
  }
  if (d < D) {
    const vi x = load_int(q + d);
    FASTTX_UNROLL(16)
    for (int j = 0; j < W; j++)
      c[j] = dpbf16(c[j], x, load_words(row_of<FULL>(k, stride, n, j) + d, D - d));
  }
  return sum_lanes<W>(c);
}
#endif

// The distance to the rows about `ahead` bytes later, 0 where there is no prefetching.
FASTTX_INLINE int64_t rows_ahead(int64_t ahead, int64_t row_bytes, int64_t stride_bytes) {
  return ahead ? max64(1, ahead / max64(1, row_bytes)) * stride_bytes : 0;
}
FASTTX_INLINE void prefetch_row(const void* row, int64_t bytes, int64_t ahead) {
  for (int64_t x = 0; x < bytes; x += 64) _mm_prefetch((const char*)row + ahead + x, _MM_HINT_T0);
}

// s[j] = q . k[j] for j < n; up to W - 1 elements after them are overwritten.
template <class E>
inline void score(const typename Kept<E>::query* q, const E* k, int64_t stride, int64_t n,
                  int64_t D, float* s, int64_t ahead) {
  const int64_t size = sizeof(E);
  ahead = rows_ahead(ahead, D * size, stride * size);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    if (ahead)
      for (int r = 0; r < W; r++) prefetch_row(k + (j + r) * stride, D * size, ahead);
    store(s + j, dots<true>(q, k + j * stride, stride, W, D));
  }
  if (j < n) store(s + j, dots<false>(q, k + j * stride, stride, (int)(n - j), D));
}

// acc[c] += sum_j p[j] v[j][c] for N vectors of columns; the last is partial below `columns`.
template <int N, class E>
FASTTX_INLINE void weigh_columns(const float* p, const E* v, int64_t stride, int64_t n, int columns,
                                 float* acc, int64_t ahead) {
  const auto row = [&](const E* at, int x) {
    return N > 1 || columns >= W ? load(at + x * W) : load_partial(at, columns);
  };
  vf o[2][N];
  FASTTX_UNROLL(8)
  for (int x = 0; x < N; x++) {
    o[0][x] = load(acc + x * W);
    o[1][x] = vf{};
  }
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) {
    FASTTX_UNROLL(2)
    for (int u = 0; u < 2; u++) {
      const E* at = v + (j + u) * stride;
      if (ahead) prefetch_row(at, N * W * sizeof(E), ahead);
      const vf w = broadcast(p + j + u);
      FASTTX_UNROLL(8)
      for (int x = 0; x < N; x++) o[u][x] = fma(w, row(at, x), o[u][x]);
    }
  }
  if (j < n) {
    const vf w = broadcast(p + j);
    FASTTX_UNROLL(8)
    for (int x = 0; x < N; x++) o[0][x] = fma(w, row(v + j * stride, x), o[0][x]);
  }
  FASTTX_UNROLL(8)
  for (int x = 0; x < N; x++) store(acc + x * W, o[0][x] + o[1][x]);
}
template <class E>
inline void weigh(const float* p, const E* v, int64_t stride, int64_t n, int64_t columns,
                  float* acc, int64_t ahead) {
  ahead = rows_ahead(ahead, columns * (int64_t)sizeof(E), stride * (int64_t)sizeof(E));
  int64_t c = 0;
  if constexpr (W == 16)
    for (; c + 8 * W <= columns; c += 8 * W)
      weigh_columns<8>(p, v + c, stride, n, W, acc + c, ahead);
  for (; c + 4 * W <= columns; c += 4 * W)
    weigh_columns<4>(p, v + c, stride, n, W, acc + c, ahead);
  for (; c < columns; c += W)
    weigh_columns<1>(p, v + c, stride, n, (int)min64(W, columns - c), acc + c, ahead);
}

#if defined(__AVX512BF16__)
// The same with bf16 weights, two rows at a time, for N times 32 columns. In acc the columns of each
// 32 stand as unpack leaves them: see in_order().
template <int N>
FASTTX_INLINE void weigh_columns(const bf16* p, const bf16* v, int64_t stride, int64_t n,
                                 int64_t columns, float* acc, int64_t ahead) {
  const auto row = [&](const bf16* at, int x) {
    return (__m512i)(N > 1 || columns >= 32 ? load_int(at + 32 * x) : load_words(at, columns));
  };
  vf o[2][2 * N];
  FASTTX_UNROLL(8)
  for (int x = 0; x < 2 * N; x++) {
    o[0][x] = load(acc + x * W);
    o[1][x] = vf{};
  }
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    FASTTX_UNROLL(2)
    for (int u = 0; u < 2; u++) {
      const bf16* at = v + (j + 2 * u) * stride;
      if (ahead) {
        prefetch_row(at, N * 64, ahead);
        prefetch_row(at + stride, N * 64, ahead);
      }
      const vi w = broadcast_pair(p + j + 2 * u);
      FASTTX_UNROLL(4)
      for (int x = 0; x < N; x++) {
        const __m512i a = row(at, x), b = row(at + stride, x);
        o[u][2 * x] = dpbf16(o[u][2 * x], w, (vi)_mm512_unpacklo_epi16(a, b));
        o[u][2 * x + 1] = dpbf16(o[u][2 * x + 1], w, (vi)_mm512_unpackhi_epi16(a, b));
      }
    }
  }
  for (; j < n; j += 2) {
    const bool both = j + 1 < n;
    const bf16* at = v + j * stride;
    const bf16 pair[2] = {p[j], both ? p[j + 1] : bf16{0}};
    const vi w = broadcast_pair(pair);
    FASTTX_UNROLL(4)
    for (int x = 0; x < N; x++) {
      const __m512i a = row(at, x), b = both ? row(at + stride, x) : _mm512_setzero_si512();
      o[0][2 * x] = dpbf16(o[0][2 * x], w, (vi)_mm512_unpacklo_epi16(a, b));
      o[0][2 * x + 1] = dpbf16(o[0][2 * x + 1], w, (vi)_mm512_unpackhi_epi16(a, b));
    }
  }
  FASTTX_UNROLL(8)
  for (int x = 0; x < 2 * N; x++) store(acc + x * W, o[0][x] + o[1][x]);
}
inline void weigh(const bf16* p, const bf16* v, int64_t stride, int64_t n, int64_t columns,
                  float* acc, int64_t ahead) {
  ahead = rows_ahead(ahead, columns * 2, stride * 2);
  int64_t c = 0;
  for (; c + 128 <= columns; c += 128)
    weigh_columns<4>(p, v + c, stride, n, 32, acc + c, ahead);
  for (; c + 64 <= columns; c += 64) weigh_columns<2>(p, v + c, stride, n, 32, acc + c, ahead);
  for (; c < columns; c += 32)
    weigh_columns<1>(p, v + c, stride, n, min64(32, columns - c), acc + c, ahead);
}
#endif

// The columns of a row's sums, left in the order of weigh().
template <class E>
FASTTX_INLINE void in_order(float* acc, int64_t width) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(typename Kept<E>::weight) == 2) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t c = 0; c < width; c += 32) {
      const __m512 low = (__m512)load(acc + c), high = (__m512)load(acc + c + 16);
      store(acc + c, (vf)_mm512_permutex2var_ps(low, first, high));
      store(acc + c + 16, (vf)_mm512_permutex2var_ps(low, second, high));
    }
  }
#endif
}

// A query with zeros up to `width`.
template <class E>
inline void prepare(const E* from, int64_t stride, int64_t D, int64_t width, float* q) {
  for (int64_t d = 0; d < width; d++) q[d] = d < D ? to_float(from[d * stride]) : 0.0f;
}
template <class E>
inline void prepare(const E* from, int64_t stride, int64_t D, int64_t width, bf16* q) {
  for (int64_t d = 0; d < width; d++) q[d] = d < D ? from[d * stride] : bf16{0};
}

FASTTX_INLINE float table_value(const fasttx_tensor& t, int64_t bucket, int64_t head) {
  const int64_t at = bucket * t.strides[0] + head * t.strides[1];
  switch (t.dtype) {
    case FASTTX_BF16:
      return to_float(((const bf16*)t.data)[at]);
    case FASTTX_F16:
      return to_float(((const f16*)t.data)[at]);
    default:
      return ((const float*)t.data)[at];
  }
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
