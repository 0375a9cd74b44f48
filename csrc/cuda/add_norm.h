// What the kernels of add_norm share: the arguments on the device, and the sum that is normalized.
#pragma once
#include "cuda/norm_row.h"

namespace fasttx {

struct AddNorm {
  fasttx_add_norm a;
  Dropout dropout;
  float* means;     // [2, M]: of dout * weight, and of dout * weight * xhat; or absent
  float* partials;  // [parts, 3, N]: sums for dweight, dbias, dx_bias over the rows of a part
  int64_t part_rows;
  int parts;
  RowGroup group;  // of rows in registers
};

// z of eight columns: residual + dropout(x + x_bias).
FASTTX_DEVICE void add_eight(const AddNorm& p, float (&z)[8], const Bits8& residual, uint32_t kept,
                             int64_t n) {
  const fasttx_add_norm& a = p.a;
  float more[8];
  if (a.x_bias.data) {
    unpack8(load8(a.x_bias.data, a.x_bias.dtype, n), a.x_bias.dtype, more);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] += more[i];
  }
  if (p.dropout.threshold) drop(p.dropout, kept, z);
  if (a.residual.data) {
    unpack8(residual, a.residual.dtype, more);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] += more[i];
  }
}

// The same of one column, of any strides.
FASTTX_DEVICE float add_one(const AddNorm& p, Key key, int64_t m, int64_t x_row,
                            int64_t residual_row, int64_t n) {
  const fasttx_add_norm& a = p.a;
  float z = load1(a.x.data, a.x.dtype, x_row + n * a.x.column);
  if (a.x_bias.data) z += load1(a.x_bias.data, a.x_bias.dtype, n * a.x_bias.column);
  z = drop(p.dropout, key, m, n, z);
  if (a.residual.data)
    z += load1(a.residual.data, a.residual.dtype, residual_row + n * a.residual.column);
  return z;
}

}  // namespace fasttx
