// What wgmma knows of a matrix in shared memory: 64 bits.
#pragma once
#include "cuda/tensor_map.h"

namespace fasttx {

// The layouts are TMA's. By rows along the inner product (K-major), 8 rows of the swizzle's width
// lie together and `stride` is the step to the next 8; transposed (MN-major), `leading` is the step
// along the outer dimension by the swizzle's width and `stride` that to the next 8 of the inner
// product. Steps are in bytes. Moving along the inner product by 16 K-major elements adds 32 bytes.
FASTTX_DEVICE uint64_t matrix_descriptor(uint32_t address, Swizzle swizzle, uint32_t stride,
                                         uint32_t leading = 16) {
  const uint64_t layout = (4 - static_cast<int>(swizzle)) & 3;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | layout << 62;
}

}  // namespace fasttx
