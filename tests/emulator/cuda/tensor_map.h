// In place of csrc/cuda/tensor_map.h: a tensor map as what it says.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

enum class Swizzle { none = 0, bytes32 = 1, bytes64 = 2, bytes128 = 3 };
enum class Element { bf16, f16, f32 };

struct alignas(64) TensorMap {
  unsigned char* data;
  Element element;
  int rank, bytes;  // of an element
  uint64_t sizes[5], strides[5];
  uint32_t box[5];
  Swizzle swizzle;
};

inline bool make_tensor_map(TensorMap* map, Element element, int rank, const void* data,
                            const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                            Swizzle swizzle) {
  *map = {};
  map->data = static_cast<unsigned char*>(const_cast<void*>(data));
  map->element = element;
  map->rank = rank;
  map->bytes = element == Element::f32 ? 4 : 2;
  map->swizzle = swizzle;
  if (rank < 1 || rank > 5 || reinterpret_cast<uintptr_t>(data) % 16) return false;
  for (int i = 0; i < 5; i++) {
    map->sizes[i] = i < rank ? sizes[i] : 1;
    map->strides[i] = i == 0 ? map->bytes : i < rank ? strides[i - 1] : 0;
    map->box[i] = i < rank ? box[i] : 1;
    if (map->sizes[i] == 0 || map->box[i] == 0 || map->box[i] > 256) return false;
    if (i && map->strides[i] % 16) return false;
  }
  const uint32_t inner = map->box[0] * map->bytes;
  return inner % 16 == 0 && (swizzle == Swizzle::none || inner <= 16u << static_cast<int>(swizzle));
}

// Where TMA and wgmma put what lies at `address`: its 16-byte chunk within the swizzle's width is
// xored with the number of its 128-byte row.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t chunks = (1u << static_cast<int>(swizzle)) - 1;
  return address ^ ((address >> 7 & chunks) << 4);
}

}  // namespace fasttx
