// Arguments of the kernels of linear_cross_entropy; the meaning is that of the inner op in
// fasttx/ops/linear_cross_entropy.py.
#pragma once
#include "fasttx.h"

//   logits [R,C]; target [R] int64; weight [V] fp32; peak, log_sum [R] and scales [3,R] fp32, all
//   contiguous but logits, whose columns are
typedef struct fasttx_logit_slope {
  fasttx_tensor logits, target, weight, peak, log_sum, scales;
  int64_t first;  // class of the first column
} fasttx_logit_slope;

//   x [n,K], weight [V,K], bias [V] of any strides; target [n] int64; class_weight [V], peak, log_sum,
//   at_target, weighted [n] and scales [3,n] fp32, contiguous; kept [V,k], k <= n, whose rows are
//   contiguous: the logits of the first k rows, from the first walk for the second one. It may be the
//   memory of dweight.
typedef struct fasttx_class_walk {
  fasttx_tensor x, weight, bias, target, class_weight, kept;
  fasttx_tensor peak, log_sum, at_target, weighted;
  fasttx_tensor scales, dx, dweight, dbias;
  int32_t need;  // dx 1, dweight 2, dbias 4
} fasttx_class_walk;
