#pragma once
#include "cuda/platform.h"

namespace fasttx {

struct alignas(16) Words {
  uint32_t w[4];
};

inline void check_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    emulator::fault(std::string(what) + " at an address that is not aligned to its size");
}
inline Words load16(const void* p) {
  check_aligned(p, 16, "a load of 16 bytes");
  emulator::traffic.read += 16;
  Words v;
  memcpy(&v, p, 16);
  return v;
}
inline Words load16_once(const void* p) { return load16(p); }
inline void store16(void* p, Words v) {
  check_aligned(p, 16, "a store of 16 bytes");
  emulator::traffic.written += 16;
  memcpy(p, &v, 16);
}
template <class T>
T load(const T* p) {
  check_aligned(p, sizeof(T), "a load");
  emulator::traffic.read += sizeof(T);
  emulator::traffic.narrow += sizeof(T);
  return *p;
}
template <class T>
void store(T* p, T value) {
  check_aligned(p, sizeof(T), "a store");
  emulator::traffic.written += sizeof(T);
  emulator::traffic.narrow += sizeof(T);
  *p = value;
}
inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

}  // namespace fasttx
