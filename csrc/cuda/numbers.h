// The 16-bit types: a tag each, with what kernels need of it.
#pragma once
#include "cuda/ptx/convert.h"

namespace fasttx {

constexpr float LOG2E = 1.4426950408889634f;

struct bf16 {
  static constexpr bool is_bf16 = true;
  uint16_t bits;
  static FASTTX_DEVICE uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  static FASTTX_DEVICE float2 unpack(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
};
struct f16 {
  static constexpr bool is_bf16 = false;
  uint16_t bits;
  static FASTTX_DEVICE uint32_t pack(float low, float high) { return pack_f16(low, high); }
  static FASTTX_DEVICE float2 unpack(uint32_t word) { return unpack_f16(word); }
};

template <class T>
FASTTX_DEVICE float to_float(T x) {
  return T::unpack(x.bits).x;
}
template <class T>
FASTTX_DEVICE T from_float(float x) {
  return {static_cast<uint16_t>(T::pack(x, 0.0f))};
}

}  // namespace fasttx
