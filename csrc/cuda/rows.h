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

// Sums over rows, for up to three vectors of N numbers, from those of the parts of the rows.
struct PartSums {
  const float* partials;  // [parts, 3, N]
  int64_t N;
  int parts;
  fasttx_rows to[3];  // data == NULL: not wanted
};

// Adds what the parts have summed, in order. A cudaError_t.
int add_parts(const PartSums& sums, void* stream);

}  // namespace fasttx
