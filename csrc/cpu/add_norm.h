// The arguments of add_norm's kernels, forward and backward. Rows are all leading dimensions of x.
#pragma once
#include <stdint.h>

// A matrix of rows, N columns: row m is (m / (size1 * size2), m / size2 % size1, m % size2) by three
// strides, or m by stride[2] alone where size1 = size2 = 0. data == NULL: absent.
struct fasttx_rows {
  void* data;
  int32_t dtype;
  int64_t size1, size2;
  int64_t stride[3];
  int64_t column;  // stride between columns
};

struct fasttx_add_norm {
  fasttx_rows x, residual, dout, dtotal;                   // inputs by rows
  fasttx_rows weight, bias, x_bias;                        // one row each
  fasttx_rows out, total, dx, dresidual;                   // outputs by rows
  fasttx_rows dweight, dbias, dx_bias;                     // one row each
  float* mean;                                             // [M], absent for rms
  float* rstd;                                             // [M]
  const void* seed;
  int64_t M, N;
  double eps, dropout_p;
  int32_t rms;
  int32_t need;  // backward: dx 1, dresidual 2, dweight 4, dbias 8, dx_bias 16
};
