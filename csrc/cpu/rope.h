// The arguments of rope's kernel, forward, backward and in place.
#pragma once
#include "fasttx.h"

//   q, q_out [B,H,S,D], k, k_out [B,G,S,D] (absent: no key), cos, sin [B|1,S,rotary or rotary / 2]
typedef struct fasttx_rope {
  fasttx_tensor q, k, q_out, k_out;  // in place: the outputs are the inputs
  fasttx_tensor cos, sin;
  int64_t rotary;                    // the first columns of a head are turned, an even number
  int32_t interleaved;               // pairs are neighbours, else halves apart
  int32_t adjoint;                   // the transposed rotation
} fasttx_rope;
