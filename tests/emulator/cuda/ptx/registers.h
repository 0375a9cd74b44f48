#pragma once
#include "cuda/platform.h"

namespace fasttx {

// The count is the compiler's concern; that a whole warp comes here is checked.
template <int COUNT>
void registers_give() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  emulator::shuffle(~0u, 0, "setmaxnreg", [](int i) { return i; });
}
template <int COUNT>
void registers_take() {
  registers_give<COUNT>();
}
inline uint32_t opaque(uint32_t x) { return x; }

}  // namespace fasttx
