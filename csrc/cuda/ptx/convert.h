// Two 16-bit numbers in a word, the first in the low half, and their fp32 values.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

FASTTX_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
FASTTX_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
FASTTX_DEVICE float2 unpack_f16(uint32_t word) {
  float2 v;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, "
      "high;\n}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(word));
  return v;
}

}  // namespace fasttx
