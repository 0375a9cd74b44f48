// Eight neighbouring numbers of any floating dtype, by 16-byte accesses: the unit in which the
// kernels that are bound by memory move. Loads give the bits, so that many can be under way before
// the first is looked at.
#pragma once
#include "cuda/numbers.h"
#include "cuda/ptx/memory.h"
#include "fasttx.h"

namespace fasttx {

template <class T>
constexpr int dtype_of = T::is_bf16 ? FASTTX_BF16 : FASTTX_F16;

struct Bits8 {
  Words w[2];  // the second is fp32's alone
};

FASTTX_DEVICE Bits8 load8(const void* data, int dtype, int64_t index) {
  Bits8 bits;
  if (dtype == FASTTX_F32) {
    const float* p = static_cast<const float*>(data) + index;
    bits.w[0] = load16(p);
    bits.w[1] = load16(p + 4);
  } else {
    bits.w[0] = load16(static_cast<const uint16_t*>(data) + index);
  }
  return bits;
}

template <class T>
FASTTX_DEVICE void unpack8(const Words& words, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = T::unpack(words.w[i]);
    v[2 * i] = two.x;
    v[2 * i + 1] = two.y;
  }
}
// Of bf16 or fp16.
FASTTX_DEVICE void unpack8(const Words& words, int dtype, float (&v)[8]) {
  if (dtype == FASTTX_BF16)
    unpack8<bf16>(words, v);
  else
    unpack8<f16>(words, v);
}
FASTTX_DEVICE void unpack8(const Bits8& bits, int dtype, float (&v)[8]) {
  if (dtype == FASTTX_F32) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __uint_as_float(bits.w[i / 4].w[i % 4]);
  } else {
    unpack8(bits.w[0], dtype, v);
  }
}

template <class T>
FASTTX_DEVICE Words pack8(const float (&v)[8]) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; i++) words.w[i] = T::pack(v[2 * i], v[2 * i + 1]);
  return words;
}
FASTTX_DEVICE Words pack8(const float (&v)[8], int dtype) {
  return dtype == FASTTX_BF16 ? pack8<bf16>(v) : pack8<f16>(v);
}
FASTTX_DEVICE void store8(void* data, int dtype, int64_t index, const float (&v)[8]) {
  if (dtype == FASTTX_F32) {
    float* p = static_cast<float*>(data) + index;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Words words;
#pragma unroll
      for (int k = 0; k < 4; k++) words.w[k] = __float_as_uint(v[4 * i + k]);
      store16(p + 4 * i, words);
    }
  } else {
    store16(static_cast<uint16_t*>(data) + index, pack8(v, dtype));
  }
}

// Whether eight neighbours along dimension `columns` lie in aligned 16 bytes, wherever they begin
// in the dimensions before it.
inline bool by_eight(const fasttx_tensor& t, int columns) {
  if (!t.data) return true;
  bool even = t.strides[columns] == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int d = 0; d < columns; d++) even &= t.sizes[d] == 1 || t.strides[d] % 8 == 0;
  return even;
}

// One number, for what is not eight.
FASTTX_DEVICE float unpack1(uint16_t bits, int dtype) {
  return dtype == FASTTX_BF16 ? bf16::unpack(bits).x : f16::unpack(bits).x;
}
FASTTX_DEVICE uint16_t pack1(float value, int dtype) {
  return dtype == FASTTX_BF16 ? from_float<bf16>(value).bits : from_float<f16>(value).bits;
}
FASTTX_DEVICE float load1(const void* data, int dtype, int64_t index) {
  if (dtype == FASTTX_F32) return load(static_cast<const float*>(data) + index);
  return unpack1(load(static_cast<const uint16_t*>(data) + index), dtype);
}
FASTTX_DEVICE void store1(void* data, int dtype, int64_t index, float value) {
  if (dtype == FASTTX_F32)
    store(static_cast<float*>(data) + index, value);
  else
    store(static_cast<uint16_t*>(data) + index, pack1(value, dtype));
}

}  // namespace fasttx
