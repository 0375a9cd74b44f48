// Sums and maxima over the lanes of a warp and over a block, the same in every thread, always in
// the same order.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

FASTTX_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int with = 16; with; with /= 2) x += __shfl_xor_sync(~0u, x, with);
  return x;
}
FASTTX_DEVICE float warp_max(float x) {
#pragma unroll
  for (int with = 16; with; with /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, with));
  return x;
}

// scratch: K * 32 floats of shared memory, free again afterwards.
template <int K>
FASTTX_DEVICE void block_sum(float (&x)[K], float* scratch) {
  const int warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < K; k++) {
    x[k] = warp_sum(x[k]);
    if (threadIdx.x % 32 == 0) scratch[k * 32 + threadIdx.x / 32] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; k++) {
    x[k] = 0.0f;
    for (int w = 0; w < warps; w++) x[k] += scratch[k * 32 + w];
  }
  __syncthreads();
}
FASTTX_DEVICE float block_max(float x, float* scratch) {
  const int warps = blockDim.x / 32;
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < warps; w++) x = fmaxf(x, scratch[w]);
  __syncthreads();
  return x;
}

}  // namespace fasttx
