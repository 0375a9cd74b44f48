// The arguments of sample's kernel.
#pragma once
#include <stdint.h>

#include "fasttx.h"

struct fasttx_sample {
  fasttx_tensor logits;  // [R, V]
  int64_t* ids;          // [R]
  const void* seed;
  float factor, top_p;
  int64_t top_k;  // 0: all
  int32_t greedy;
};
