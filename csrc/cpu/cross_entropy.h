// Arguments of the cross-entropy kernels; the meaning is that of the inner op in
// fasttx/ops/cross_entropy.py.
#pragma once
#include "fasttx.h"

enum fasttx_reduction { FASTTX_NONE = 0, FASTTX_MEAN = 1, FASTTX_SUM = 2 };

//   logits, dlogits [B,S,V]; target [B*S] int64 and weight [V] fp32 contiguous
//   loss [B*S] or one element fp32; peak, log_sum [B*S] fp32; norm [2] fp32; factor one fp32
//   dloss one element or [B*S] fp32
typedef struct fasttx_cross_entropy {
  fasttx_tensor loss, peak, log_sum, norm, factor;
  fasttx_tensor logits, target, weight;
  fasttx_tensor dloss, dlogits;
  double label_smoothing, z_loss;
  int64_t ignore_index;
  int32_t reduction;
} fasttx_cross_entropy;
