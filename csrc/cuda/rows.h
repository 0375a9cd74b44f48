// Rows of tensors, and sums over them in parts.
#pragma once
#include "cpu/add_norm.h"
#include "cuda/eight.h"

namespace fasttx {

FASTTX_DEVICE int64_t row_offset(const fasttx_rows& r, int64_t m) {
  if (!r.size1) return m * r.stride[2];
  const int64_t outer = m / r.size2;
  return outer / r.size1 * r.stride[0] + outer % r.size1 * r.stride[1] + m % r.size2 * r.stride[2];
}

// Whether eight columns lie in aligned 16 (fp32: 32) bytes in every row.
inline bool by_eight(const fasttx_rows& r) {
  if (!r.data) return true;
  bool even = r.column == 1 && reinterpret_cast<uintptr_t>(r.data) % 16 == 0;
  for (int64_t s : r.stride) even &= s % 8 == 0;
  return even;
}

// What parts have summed, added in an order of its own: up to three matrices [rows, columns], of
// which matrix k of part p begins at partials + p * part + k * matrix.
struct PartSums {
  struct To {
    void* data;  // nullptr: not wanted
    int dtype;
    int64_t row, column;  // strides
  } to[3];
  const float* partials;
  int64_t part, matrix, rows, columns;
  int parts;
};
// A cudaError_t.
int add_parts(const PartSums& sums, void* stream);

// Of vectors of N numbers from partials [parts, 3, N].
inline int add_parts(const float* partials, int64_t N, int parts, const fasttx_rows& first,
                     const fasttx_rows& second, const fasttx_rows& third, void* stream) {
  auto to = [](const fasttx_rows& r) { return PartSums::To{r.data, r.dtype, 0, r.column}; };
  return add_parts({{to(first), to(second), to(third)}, partials, 3 * N, N, 1, N, parts}, stream);
}

}  // namespace fasttx
