// Arguments of the kernels of ffn; the meaning is that of the inner op in fasttx/ops/ffn.py.
#pragma once
#include "fasttx.h"

typedef struct fasttx_ffn {
  fasttx_tensor out, pre, pre_gate, x, w1, b1, w2, b2, w_gate, b_gate;
  fasttx_tensor dx, dw1, db1, dw2, db2, dw_gate, db_gate, dout;
  const void* seed;
  double hidden_dropout_p, dropout_p;
  int32_t activation;
  int32_t keep;  // forward: write pre and pre_gate
  int32_t need;  // backward: dx 1, dw1 2, db1 4, dw2 8, db2 16, dw_gate 32, db_gate 64
} fasttx_ffn;
