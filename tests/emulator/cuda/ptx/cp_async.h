#pragma once
#include "cuda/platform.h"

namespace fasttx {

inline void cp_async_part(uint32_t to, const void* from, int bytes) {
  auto* target = static_cast<unsigned char*>(emulator::shared_pointer(to, 16, 16));
  if (reinterpret_cast<uintptr_t>(from) % 16)
    emulator::fault("cp.async from an address that is not aligned to 16");
  if (bytes < 0 || bytes > 16) emulator::fault("cp.async of " + std::to_string(bytes) + " bytes");
  emulator::traffic.read += bytes;
  auto copy = [=] {
    memcpy(target, from, bytes);
    memset(target + bytes, 0, 16 - bytes);
  };
  if (emulator::eager())
    copy();
  else
    emulator::running->open.push_back(copy);
}
inline void cp_async16(uint32_t to, const void* from, bool valid) {
  cp_async_part(to, from, valid ? 16 : 0);
}
inline void cp_async16(uint32_t to, const void* from) { cp_async16(to, from, true); }
inline void cp_async_commit() {
  emulator::Thread& me = *emulator::running;
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
template <int N>
void cp_async_wait() {
  auto& groups = emulator::running->groups;
  for (; groups.size() > N; groups.pop_front())
    for (auto& copy : groups.front()) copy();
}

}  // namespace fasttx
