// Softmax along a dimension that is not the one side by side in memory: neighbouring rows are lanes,
// so that memory is read as it lies and nothing is reduced across lanes.
#pragma once
#include "cpu/softmax_row.h"

namespace fasttx::FASTTX_ISA {

int softmax_columns_fwd(const fasttx_softmax& a, int lanes);
int softmax_columns_bwd(const fasttx_softmax& a, int lanes);

namespace {

// The leading dimension whose rows are side by side in both tensors where columns are not, or -1.
inline int lane_dimension(const fasttx_tensor& x, const fasttx_tensor& y) {
  if (x.strides[3] == 1 || x.sizes[3] == 1 || x.dtype != y.dtype) return -1;
  for (int d = 2; d >= 0; d--)
    if (x.strides[d] == 1 && y.strides[d] == 1 && x.sizes[d] >= 4) return d;
  return -1;
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
