// The arguments of softmax's kernels, forward and backward; the meaning is that of the inner ops in
// fasttx/ops/softmax.py.
#pragma once
#include "fasttx.h"

// Every tensor has four dimensions, columns last, and stride 0 where its size is 1. mask and dmask
// broadcast to x. In the backward out is the forward's result, and dx or dmask may be absent.
typedef struct fasttx_softmax {
  fasttx_tensor x, mask, out;
  fasttx_tensor dout, dx, dmask;
  double scale;
  int32_t causal;  // row i, of dimension 2, sees columns j <= i, or j <= i + T - S for lower_right
  int32_t lower_right;
  int32_t log;
} fasttx_softmax;
