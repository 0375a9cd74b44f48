// Arguments of the decoding kernels; the meaning is that of the inner ops in
// fasttx/ops/attention_decode.py.
#pragma once
#include "fasttx.h"

//   out [B,H,S,Dv], q [B,H,S,D], k [B|pages,G,T|page,D], v [B|pages,G,T|page,Dv], lengths [B] int32,
//   start [B] int32, block_table [B,n] int32, slopes [B|1,H] fp32, positions [B|1,T] fp32,
//   table [buckets,H], lut [2*M+1] int32; k_new [B,G,S,D] and v_new [B,G,S,Dv] for the append
typedef struct fasttx_decode {
  fasttx_tensor out, q, k, v;
  fasttx_tensor lengths, start, block_table;
  fasttx_tensor slopes, positions, table, lut;
  fasttx_tensor k_new, v_new;
  double scale;
  double softcap;  // 0: none
  int64_t left;    // -1: unbounded
  int64_t right;   // -1: unbounded
} fasttx_decode;
