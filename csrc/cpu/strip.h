// Work on a strip of results [rows][LANES] in fp32, whose lanes are tokens and whose rows are columns
// of the output: what linear and ffn do before it leaves the first cache.
#pragma once
#include "cpu/activation.h"
#include "cpu/gemm.h"
#include "cpu/pages.h"
#include "cpu/philox.h"

namespace fasttx::FASTTX_ISA {
namespace {

FASTTX_INLINE Operand matrix(const fasttx_tensor& t) {
  return {t.data, t.dtype, t.strides[0], t.strides[1]};
}
FASTTX_INLINE Operand transposed(const Operand& m) { return {m.data, m.dtype, m.column, m.row}; }
inline Operand from_row(Operand m, int64_t i) {
  const int64_t size = m.dtype == FASTTX_F32 ? 4 : 2;
  m.data = (const char*)m.data + i * m.row * size;
  return m;
}

template <class T>
FASTTX_INLINE float bias_at(const fasttx_tensor& bias, int64_t n) {
  return to_float(((const T*)bias.data)[n * bias.strides[0]]);
}
// Row r += bias[n + r].
template <class T>
inline void add_bias(float* s, int64_t rows, const fasttx_tensor& bias, int64_t n) {
  if (!bias.data) return;
  for (int64_t r = 0; r < rows; r++) {
    const vf b = set1(bias_at<T>(bias, n + r));
    for (int l = 0; l < LANES; l += W) store(s + r * LANES + l, load(s + r * LANES + l) + b);
  }
}

// s = act(s), times the gate where there is one.
inline void apply_activation(int activation, float* s, const float* gate, int64_t rows, int vecs) {
  if (activation == NONE && !gate) return;
  with_activation(activation, [&](auto tag) {
    for (int64_t r = 0; r < rows; r++)
      for (int v = 0; v < vecs; v++) {
        float* p = s + r * LANES + v * W;
        vf y = activate<decltype(tag)::value>(load(p));
        if (gate) y *= load(gate + r * LANES + v * W);
        store(p, y);
      }
  });
}

// Dropout of columns n ... (a multiple of 8) of tokens m ...
inline void drop_strip(const Dropout& d, float* s, int64_t rows, int vecs, int64_t m, int64_t n,
                       uint32_t place) {
  if (!d.threshold) return;
  const vf scale = set1(d.keep_scale);
  for (int v = 0; v < vecs; v++) {
    const PhiloxRows tokens = philox_rows(d, (vu)lane_index() + (uint32_t)(m + v * W), place);
    for (int64_t r = 0; r < rows; r += 8) {
      vu words[4];
      philox(d, tokens, (uint32_t)((n + r) / 8), place, 0, words);
      for (int c = 0; c < 8 && r + c < rows; c++) {
        float* p = s + (r + c) * LANES + v * W;
        const vmask keep =
            c % 2 ? keep_odd(words[c / 2], d.threshold) : keep_even(words[c / 2], d.threshold);
        store(p, zero_unless(keep, load(p) * scale));
      }
    }
  }
}

// out[m + l][n + r] = s[r][l], plus the residual where there is one.
template <class T>
inline void put_transposed(const float* s, int64_t rows, int64_t lanes, const fasttx_tensor& out,
                           const fasttx_tensor& residual, int64_t m, int64_t n) {
  const Operand to = matrix(out), more = matrix(residual);
  for (int64_t l = 0; l < lanes; l += W)
    for (int64_t r = 0; r < rows; r += W) {
      const int count = (int)min64(W, rows - r), tokens = (int)min64(W, lanes - l);
      vf t[W];
      FASTTX_UNROLL(16)
      for (int c = 0; c < W; c++) t[c] = load(s + (r + c) * LANES + l);
      transpose(t);
      for (int c = 0; c < tokens; c++) {
        if (more.data)
          t[c] += load_strided(element<const T>(more, m + l + c, n + r), more.column, count);
        store_strided(element<T>(to, m + l + c, n + r), to.column, t[c], count);
      }
    }
}

// The same where rows are tokens m ... and lanes are columns n ...: of few tokens, and where weights
// are kept transposed and there are not many.
constexpr int64_t TURNED_FEW = 256;
template <class T>
inline void add_bias_columns(float* s, int64_t rows, int64_t count, const fasttx_tensor& bias,
                             int64_t n) {
  if (!bias.data) return;
  for (int64_t c = 0; c < count; c += W) {
    const vf b = load_strided((const T*)bias.data + (n + c) * bias.strides[0], bias.strides[0],
                              (int)min64(W, count - c));
    for (int64_t r = 0; r < rows; r++) store(s + r * LANES + c, load(s + r * LANES + c) + b);
  }
}
inline void drop_columns(const Dropout& d, float* s, int64_t rows, int64_t m, int64_t n,
                         uint32_t place) {
  if (!d.threshold) return;
  uint16_t numbers[LANES > 8 * W ? LANES : 8 * W];
  for (int64_t r = 0; r < rows; r++) {
    philox_row(d, LANES, (uint32_t)(m + r), place, 0, numbers, (uint32_t)(n / 8));
    for (int c = 0; c < LANES; c += W) {
      float* p = s + r * LANES + c;
      store(p, zero_unless(keep_columns(numbers + c, d.threshold), load(p) * set1(d.keep_scale)));
    }
  }
}
template <class T>
inline void put_columns(const float* s, int64_t rows, int64_t count, const Operand& to, int64_t m,
                        int64_t n) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < count; c += W)
      store_strided(element<T>(to, m + r, n + c), to.column, load(s + r * LANES + c),
                    (int)min64(W, count - c));
}
template <class T>
inline void add_columns(float* s, int64_t rows, int64_t count, const Operand& from, int64_t m,
                        int64_t n) {
  if (!from.data) return;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < count; c += W) {
      float* p = s + r * LANES + c;
      store(p, load(p) + load_strided(element<const T>(from, m + r, n + c), from.column,
                                      (int)min64(W, count - c)));
    }
}

// Rows of a chunk of the backward, whose copies of `columns` columns stay bounded.
inline int64_t chunk_rows(int64_t columns) {
  return max64(256, min64(4096, ((int64_t)1 << 22) / max64(1, columns) / LANES * LANES));
}

// The gradient of a parameter, summed over chunks of rows: [I][J] by any strides.
struct Gradient {
  fasttx_tensor out;
  bool swapped;  // its columns are closer in memory than its rows
  float* sum;

  int64_t floats() const {
    return out.dtype == FASTTX_F32 && out.strides[0] == out.sizes[1] && out.strides[1] == 1
               ? 0
               : out.sizes[0] * out.sizes[1];
  }
  // a [M][I] and b [M][J] of a chunk.
  int add(const Operand& a, const Operand& b, int64_t M, bool first, bool last) const {
    const Operand &rows = swapped ? b : a, &columns = swapped ? a : b;
    const int64_t I = out.sizes[swapped], J = out.sizes[!swapped];
    if (M <= FEW_OUTER && first && last && J > 0 && out.strides[!swapped] == 1)
      return add_outer(rows, columns, M, I, J,
                       {out.data, out.dtype, out.strides[swapped], out.strides[!swapped]});
    const Term term = {transposed(rows), transposed(columns), M};
    const Total total = {out.data, out.dtype, out.strides[swapped], out.strides[!swapped],
                         sum,      first,     last};
    return multiply_into(&term, 1, I, J, total);
  }
};
inline Gradient gradient(const fasttx_tensor& out) {
  const int64_t size = out.dtype == FASTTX_F32 ? 4 : 2, count = out.sizes[0] * out.sizes[1];
  if (count && max64(out.sizes[0] * out.strides[0], out.sizes[1] * out.strides[1]) == count)
    prefer_large_pages(out.data, count * size);
  return {out, out.strides[1] != 1 && out.strides[0] == 1, (float*)out.data};
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
