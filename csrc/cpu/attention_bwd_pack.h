// Packing of the operands of the attention backward: strided rows of any dtype become zero-padded
// rows of 32-bit units, their pairs along the rows, and their transpose.
#pragma once
#include "cpu/attention_bwd_product.h"
#include "fasttx.h"

namespace fasttx::FASTTX_ISA {
namespace {

// A matrix [rows][columns] somewhere in a tensor, strides in elements.
struct Matrix {
  char* data;
  int32_t dtype;
  int64_t row, column;
};

constexpr int64_t element_size(int32_t dtype) {
  return dtype == FASTTX_F32 ? 4 : dtype == FASTTX_BOOL ? 1 : 2;
}

// f is called with a pointer of the element type of a floating dtype.
template <class F>
FASTTX_INLINE void with_type(int32_t dtype, void* p, const F& f) {
  if (dtype == FASTTX_F32)
    f((float*)p);
  else if (dtype == FASTTX_BF16)
    f((bf16*)p);
  else
    f((f16*)p);
}

// load_strided with the stride 0 of expanded tensors made fast.
template <class T>
FASTTX_INLINE vf load_any(const T* p, int64_t stride, int64_t n) {
  if (stride == 0) {
    const vf x = set1(to_float(*p));
    return n >= W ? x : zero_unless(less(lane_index(), set1i((int)n)), x);
  }
  return load_strided(p, stride, n >= W ? W : (int)n);
}

FASTTX_INLINE vi max_int(vi a, vi b) { return select(less(a, b), b, a); }
FASTTX_INLINE bool any_above(vi x, int32_t limit) { return any(less(set1i(limit), x)); }

// Magnitudes from 2^48 on, NaN and Inf among them, are `large`: with smaller ones no product below
// overflows, so that 0 * x is 0 for hidden pairs.
constexpr int32_t LARGE = 0x57800000 - 1;

// dst [rows][ld] = rows first .. first + rows of m, `columns` of them, as fp32, zeros after; rows
// from `valid` on are zero. True if an element is large.
__attribute__((noinline)) bool load_rows(float* dst, int64_t ld, const Matrix& m, int64_t first,
                                         int64_t valid, int64_t rows, int64_t columns) {
  vi top = vi{};
  with_type(m.dtype, m.data, [&](auto* base) {
    for (int64_t r = 0; r < rows; r++) {
      float* out = dst + r * ld;
      int64_t c = 0;
      if (r < valid) {
        const auto* p = base + (first + r) * m.row;
        for (; c < columns; c += W) {
          const vf x = load_any(p + c * m.column, m.column, columns - c);
          top = max_int(top, as_int(x) & 0x7fffffff);
          store(out + c, x);
        }
      }
      for (; c < ld; c += W) store(out + c, vf{});
    }
  });
  return any_above(top, LARGE);
}

#if defined(__AVX512BF16__)
// load_rows for bf16 kept as it is; ld counts units of two elements.
__attribute__((noinline)) bool load_rows_bf16(float* dst, int64_t ld, const Matrix& m,
                                              int64_t first, int64_t valid, int64_t rows,
                                              int64_t columns) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i top = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; r++) {
    uint16_t* out = (uint16_t*)(dst + r * ld);
    const uint16_t* p = (const uint16_t*)m.data + (first + r) * m.row;
    if (r < valid && columns == 2 * ld && m.column == 1) {
      for (int64_t c = 0; c < 2 * ld; c += 32) {
        const __m512i x = _mm512_loadu_si512(p + c);
        top = _mm512_max_epu16(top, _mm512_and_si512(x, magnitude));
        _mm512_storeu_si512(out + c, x);
      }
      continue;
    }
    for (int64_t c = 0; c < 2 * ld; c += 32) {
      const int64_t n = r < valid ? columns - c : 0;
      __m512i x;
      if (m.column == 1) {
        x = _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0, p + c);
      } else {
        uint16_t t[32] = {};
        for (int64_t i = 0; i < 32 && i < n; i++) t[i] = p[(c + i) * m.column];
        x = _mm512_loadu_si512(t);
      }
      top = _mm512_max_epu16(top, _mm512_and_si512(x, magnitude));
      _mm512_storeu_si512(out + c, x);
    }
  }
  return _mm512_cmpgt_epu16_mask(top, _mm512_set1_epi16(LARGE >> 16)) != 0;
}

// out [rows / 2][2 * ld] = pairs of neighbouring rows of bf16 rows [rows][ld units].
__attribute__((noinline)) void pair_rows(float* out, const float* rows, int64_t ld, int64_t n) {
  alignas(64) uint16_t index[64];
  for (int i = 0; i < 32; i++) {
    index[2 * i] = i;
    index[2 * i + 1] = i + 32;
  }
  const __m512i low = _mm512_load_si512(index), high = _mm512_load_si512(index + 32);
  for (int64_t r = 0; r < n; r += 2)
    for (int64_t c = 0; c < ld; c += 16) {
      const __m512i a = _mm512_loadu_si512(rows + r * ld + c);
      const __m512i b = _mm512_loadu_si512(rows + (r + 1) * ld + c);
      _mm512_storeu_si512(out + r * ld + 2 * c, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(out + r * ld + 2 * c + 16, _mm512_permutex2var_epi16(a, high, b));
    }
}
#endif

// out [ld][BLOCK_Q] = transpose of rows [BLOCK_Q][ld] in units; ld is a multiple of W.
__attribute__((noinline)) void transpose_rows(float* out, const float* rows, int64_t ld) {
  for (int q = 0; q < BLOCK_Q; q += W)
    for (int64_t u = 0; u < ld; u += W) {
      vf x[W];
      FASTTX_UNROLL(16)
      for (int i = 0; i < W; i++) x[i] = load(rows + (q + i) * ld + u);
      transpose(x);
      FASTTX_UNROLL(16)
      for (int i = 0; i < W; i++) store(out + (u + i) * BLOCK_Q + q, x[i]);
    }
}

// Rows as the products want them: units [rows][ld], and where PER_UNIT is 2 and pairs is not null
// their pairs [rows / 2][2 * ld].
template <class U>
FASTTX_INLINE bool pack_operand(float* units, float* pairs, int64_t ld, const Matrix& m,
                                int64_t first, int64_t valid, int64_t rows, int64_t columns) {
#if defined(__AVX512BF16__)
  if constexpr (U::PER_UNIT == 2) {
    const bool large = load_rows_bf16(units, ld, m, first, valid, rows, columns);
    if (pairs) pair_rows(pairs, units, ld, rows);
    return large;
  }
#endif
  return load_rows(units, ld, m, first, valid, rows, columns);
}

#if defined(__AVX512BF16__)
// Two vectors rounded to bf16 side by side; subnormals become 0.
FASTTX_INLINE void store_bf16(bf16* p, vf low, vf high) {
  store_int(p, (vi)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#endif

// Rows scaled, rounded to the dtype of m and written: m[first + r][c] = factor * src[r * ld + c].
__attribute__((noinline)) void store_rows(const Matrix& m, int64_t first, int64_t rows,
                                          int64_t columns, const float* src, int64_t ld,
                                          float factor) {
#if defined(__AVX512BF16__)
  if (m.dtype == FASTTX_BF16 && m.column == 1 && columns % 32 == 0) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c += 32)
        store_bf16((bf16*)m.data + (first + r) * m.row + c, load(src + r * ld + c) * factor,
                   load(src + r * ld + c + W) * factor);
    return;
  }
#endif
  with_type(m.dtype, m.data, [&](auto* base) {
    for (int64_t r = 0; r < rows; r++) {
      auto* p = base + (first + r) * m.row;
      for (int64_t c = 0; c < columns; c += W)
        store_strided(p + c * m.column, m.column, load(src + r * ld + c) * factor,
                      (int)min64(W, columns - c));
    }
  });
}

// The transpose of src [columns][BLOCK_Q], scaled: m[first + r][c] = factor * src[c * BLOCK_Q + r],
// r < rows <= BLOCK_Q. src has a multiple of W columns.
__attribute__((noinline)) void store_transposed(const Matrix& m, int64_t first, int64_t rows,
                                                int64_t columns, const float* src, float factor) {
#if defined(__AVX512BF16__)
  if (m.dtype == FASTTX_BF16 && m.column == 1 && columns % 32 == 0 && rows == BLOCK_Q) {
    for (int64_t q = 0; q < BLOCK_Q; q += W)
      for (int64_t c = 0; c < columns; c += 32) {
        vf x[W], y[W];
        FASTTX_UNROLL(16)
        for (int i = 0; i < W; i++) {
          x[i] = load(src + (c + i) * BLOCK_Q + q) * factor;
          y[i] = load(src + (c + W + i) * BLOCK_Q + q) * factor;
        }
        transpose(x);
        transpose(y);
        bf16* p = (bf16*)m.data + (first + q) * m.row + c;
        FASTTX_UNROLL(16)
        for (int i = 0; i < W; i++) store_bf16(p + i * m.row, x[i], y[i]);
      }
    return;
  }
#endif
  with_type(m.dtype, m.data, [&](auto* base) {
    for (int64_t q = 0; q < rows; q += W)
      for (int64_t c = 0; c < columns; c += W) {
        vf x[W];
        FASTTX_UNROLL(16)
        for (int i = 0; i < W; i++) x[i] = load(src + (c + i) * BLOCK_Q + q) * factor;
        transpose(x);
        auto* p = base + (first + q) * m.row + c * m.column;
        const int n = (int)min64(W, columns - c), count = (int)min64(W, rows - q);
        for (int i = 0; i < count; i++) store_strided(p + i * m.row, m.column, x[i], n);
      }
  });
}

// delta[r] = sum over c of a[first + r][c] * b[first + r][c], in lanes that are added in pairs.
__attribute__((noinline)) void row_dots(float* delta, const Matrix& a, const Matrix& b,
                                        int64_t first, int64_t rows, int64_t columns) {
  with_type(a.dtype, a.data, [&](auto* base) {
    for (int64_t r = 0; r < rows; r += W) {
      vf sum[W];
      for (int i = 0; i < W; i++) {
        const int64_t row = first + min64(r + i, rows - 1);
        const auto* x = base + row * a.row;
        const auto* y = decltype(base)(b.data) + row * b.row;
        vf s = vf{};
        if (a.column == 1 && b.column == 1 && columns % W == 0) {
          for (int64_t c = 0; c < columns; c += W) s = fma(load(x + c), load(y + c), s);
        } else {
          for (int64_t c = 0; c < columns; c += W)
            s = fma(load_any(x + c * a.column, a.column, columns - c),
                    load_any(y + c * b.column, b.column, columns - c), s);
        }
        sum[i] = s;
      }
      transpose(sum);
      FASTTX_UNROLL(4)
      for (int n = W / 2; n > 0; n /= 2) FASTTX_UNROLL(8)
      for (int i = 0; i < n; i++) sum[i] += sum[i + n];
      store_strided(delta + r, 1, sum[0], (int)min64(W, rows - r));
    }
  });
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
