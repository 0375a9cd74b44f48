#pragma once
#include "cuda/platform.h"

namespace fasttx {

inline void semaphore_wait(const int* p, int value) {
  emulator::wait("a semaphore", [=] { return *p == value; });
}
inline void semaphore_set(int* p, int value) { *p = value; }

}  // namespace fasttx
