// Arguments of the attention map's kernel; the meaning is that of the inner op in
// fasttx/ops/attention_map.py.
#pragma once
#include "fasttx.h"

typedef struct fasttx_attention_map {
  fasttx_attention a;         // q, k, lse and what shapes the logits
  fasttx_tensor heads, rows;  // int64 [h] and [r]; absent: all
  fasttx_tensor out;          // fp32 [B,h,r,T], or [B,h,pool,pool]
  int64_t pool;               // 0: none
} fasttx_attention_map;
