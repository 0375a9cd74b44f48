// setmaxnreg (sm_90a): a warpgroup gives registers away, or takes them.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

template <int COUNT>
FASTTX_DEVICE void registers_give() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
FASTTX_DEVICE void registers_take() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
// The same number, which the compiler does not know: what follows from it inside a loop is worked
// out again rather than kept in registers.
FASTTX_DEVICE uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace fasttx
