// Matrices of any strides, copied into the orders the register tiles read.
#pragma once
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

// rows x D of src, transposed to out[d][NQ] with lanes = rows; rows beyond `rows` and columns up to
// round_up(D, W) are zero.
template <int NQ, class E>
FASTTX_NOINLINE void pack_lanes(const E* src, int64_t row_stride, int64_t column_stride, int64_t rows,
                       int64_t D, vf* out) {
  for (int v = 0; v < NQ; v++) {
    int64_t d = 0;
    for (; column_stride == 1 && (v + 1) * W <= rows && d + W <= D; d += W) {
      vf t[W];
      const E* p = src + v * W * row_stride + d;
      FASTTX_UNROLL(16)
      for (int r = 0; r < W; r++) t[r] = load(p + r * row_stride);
      transpose(t);
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) out[(d + c) * NQ + v] = t[c];
    }
    for (; d < D; d += W) {
      vf t[W];
      for (int r = 0; r < W; r++) {
        const int64_t row = v * W + r;
        t[r] = row < rows ? load_strided(src + row * row_stride + d * column_stride, column_stride,
                                         (int)min64(W, D - d))
                          : vf{};
      }
      transpose(t);
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) out[(d + c) * NQ + v] = t[c];
    }
  }
}
// The same as bf16 pairs out[d / 2][NQ]; columns up to round_up(D, 2 * W) are zero.
template <int NQ>
FASTTX_NOINLINE void pack_lanes_pairs(const bf16* src, int64_t row_stride, int64_t column_stride,
                             int64_t rows, int64_t D, vi* out) {
  for (int v = 0; v < NQ; v++) {
    int64_t d = 0;
    for (; column_stride == 1 && (v + 1) * W <= rows && d + 2 * W <= D; d += 2 * W) {
      vi t[W];
      const bf16* p = src + v * W * row_stride + d;
      FASTTX_UNROLL(16)
      for (int r = 0; r < W; r++) t[r] = load_int(p + r * row_stride);
      transpose(t);
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) out[(d / 2 + c) * NQ + v] = t[c];
    }
    for (; d < D; d += 2 * W) {
      vi t[W];
      for (int r = 0; r < W; r++) {
        const int64_t row = v * W + r;
        const bf16* p = src + row * row_stride + d * column_stride;
        if (row >= rows) {
          t[r] = vi{};
        } else if (column_stride == 1 && d + 2 * W <= D) {
          t[r] = load_int(p);
        } else {
          bf16 buffer[2 * W] = {};
          for (int c = 0; c < 2 * W && d + c < D; c++) buffer[c] = p[c * column_stride];
          t[r] = load_int(buffer);
        }
      }
      transpose(t);
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) out[(d / 2 + c) * NQ + v] = t[c];
    }
  }
}
// rows x D of src to fp32 rows out[row][width], zero from D to width.
template <class E>
inline void pack_rows(const E* src, int64_t row_stride, int64_t column_stride, int64_t rows,
                      int64_t D, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; r++) {
    const E* row = src + r * row_stride;
    float* to = out + r * width;
    int64_t d = 0;
    if (column_stride == 1)
      for (; d + W <= D; d += W) store(to + d, load(row + d));
    for (; d < D; d++) to[d] = to_float(row[d * column_stride]);
    for (; d < width; d++) to[d] = 0.0f;
  }
}
// rows x D of src to bf16 rows out[row][width], zero from D to width.
inline void copy_rows(const bf16* src, int64_t row_stride, int64_t column_stride, int64_t rows,
                      int64_t D, int64_t width, bf16* out) {
  for (int64_t r = 0; r < rows; r++) {
    if (column_stride == 1)
      __builtin_memcpy(out + r * width, src + r * row_stride, D * sizeof(bf16));
    else
      for (int64_t d = 0; d < D; d++) out[r * width + d] = src[r * row_stride + d * column_stride];
    for (int64_t d = D; d < width; d++) out[r * width + d].bits = 0;
  }
}
// rows x D of src, two rows interleaved: out[row / 2][width][2], zero from D to width and in the
// last row of an odd count.
inline void pack_row_pairs(const bf16* src, int64_t row_stride, int64_t column_stride, int64_t rows,
                           int64_t D, int64_t width, bf16* out) {
  for (int64_t r = 0; r < rows; r += 2) {
    const bf16* a = src + r * row_stride;
    const bf16* b = a + row_stride;
    uint16_t* to = (uint16_t*)out + r * width;
    const bool both = r + 1 < rows;
    int64_t d = 0;
#if FASTTX_AVX512
    if (column_stride == 1 && both) {
      const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      for (; d + 32 <= D; d += 32) {
        const __m512i x = _mm512_loadu_si512(a + d), y = _mm512_loadu_si512(b + d);
        _mm512_storeu_si512(to + 2 * d, _mm512_permutex2var_epi16(x, low, y));
        _mm512_storeu_si512(to + 2 * d + 32, _mm512_permutex2var_epi16(x, high, y));
      }
    }
#endif
    for (; d < D; d++) {
      to[2 * d] = a[d * column_stride].bits;
      to[2 * d + 1] = both ? b[d * column_stride].bits : 0;
    }
    for (; d < width; d++) to[2 * d] = to[2 * d + 1] = 0;
  }
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
