// Global memory by 16 bytes, and shared-memory addresses.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

struct alignas(16) Words {
  uint32_t w[4];
};

FASTTX_DEVICE Words load16(const void* p) {
  Words v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}
// For what no thread reads again: leaves the first-level cache to others.
FASTTX_DEVICE Words load16_once(const void* p) {
  Words v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}
FASTTX_DEVICE void store16(void* p, Words v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]),
               "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
template <class T>
FASTTX_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
FASTTX_DEVICE void store(T* p, T value) {
  *p = value;
}

FASTTX_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace fasttx
