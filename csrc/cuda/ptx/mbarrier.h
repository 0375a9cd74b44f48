// mbarrier (sm_90): a barrier in shared memory that also counts the bytes of asynchronous copies. A
// phase ends when all arrivals and all bytes are in; wait(b, p) waits until phase p has ended.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

FASTTX_DEVICE void mbarrier_init(uint32_t b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}
// After the inits, before anybody uses them.
FASTTX_DEVICE void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
FASTTX_DEVICE void mbarrier_arrive(uint32_t b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory");
}
FASTTX_DEVICE void mbarrier_arrive_expect(uint32_t b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes)
               : "memory");
}
FASTTX_DEVICE void mbarrier_wait(uint32_t b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN_%=;\n}" ::"r"(b),
      "r"(parity)
      : "memory");
}

}  // namespace fasttx
