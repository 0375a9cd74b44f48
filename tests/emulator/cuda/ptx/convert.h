#pragma once
#include "cuda/platform.h"

namespace fasttx {

inline uint16_t round_bf16(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline uint16_t round_f16(float x) {
  return x != x ? 0x7fff : __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}
inline float from_f16(uint16_t x) { return static_cast<float>(__builtin_bit_cast(_Float16, x)); }

inline uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | uint32_t{round_bf16(high)} << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return round_f16(low) | uint32_t{round_f16(high)} << 16;
}
inline float2 unpack_f16(uint32_t word) {
  return {from_f16(static_cast<uint16_t>(word)), from_f16(static_cast<uint16_t>(word >> 16))};
}

}  // namespace fasttx
