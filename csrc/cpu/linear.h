// Arguments of the kernels of linear; the meaning is that of the inner op in fasttx/ops/linear.py.
#pragma once
#include "fasttx.h"

typedef struct fasttx_linear {
  fasttx_tensor out, pre, x, weight, bias, residual;
  fasttx_tensor dx, dweight, dbias, dout;
  int32_t activation;
  int32_t keep;  // forward: write pre
  int32_t need;  // backward: dx 1, dweight 2, dbias 4
} fasttx_linear;
