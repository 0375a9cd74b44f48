// Counters in global memory by which blocks take turns.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

// Until *p == value; what was written before semaphore_set is seen after it.
FASTTX_DEVICE void semaphore_wait(const int* p, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(p) : "memory");
  } while (seen != value);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
FASTTX_DEVICE void semaphore_set(int* p, int value) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

}  // namespace fasttx
