// Arguments of linear_cross_entropy_slope; the meaning is that of the inner op in
// fasttx/ops/linear_cross_entropy.py.
#pragma once
#include "fasttx.h"

//   logits [R,C]; target [R] int64; weight [V] fp32; peak, log_sum [R] and scales [3,R] fp32, all
//   contiguous but logits, whose columns are
typedef struct fasttx_logit_slope {
  fasttx_tensor logits, target, weight, peak, log_sum, scales;
  int64_t first;  // class of the first column
} fasttx_logit_slope;
