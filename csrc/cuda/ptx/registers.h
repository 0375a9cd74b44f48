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

}  // namespace fasttx
