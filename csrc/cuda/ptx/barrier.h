// Named barriers 1 .. 15 (0 is __syncthreads), of a multiple of 32 threads.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

FASTTX_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTTX_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fasttx
