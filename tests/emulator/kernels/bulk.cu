// to += 2 * from by copies without a tensor map: the block of chunk c fetches it, doubles it and
// adds it onto `to`, which all blocks share, in the order of the chunks.
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/semaphore.h"
#include "cuda/ptx/tma.h"

namespace fasttx {
namespace {

enum Bug { NONE, NO_LOAD_WAIT, NO_STORE_WAIT };

struct Bulk {
  const float* from;  // [chunks, floats]
  float* to;          // [floats]
  int* counters;      // ticket, turn
  int floats, bug;
};

__global__ void bulk_add(const __grid_constant__ Bulk a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FASTTX_SHARED(shared);
  float* x = reinterpret_cast<float*>(shared);
  const uint32_t base = shared_address(shared), bytes = a.floats * 4, full = base + bytes;
  int* chunk = reinterpret_cast<int*>(shared + bytes + 8);
  if (threadIdx.x == 0) {
    *chunk = atomicAdd(&a.counters[0], 1);
    mbarrier_init(full, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  const int turn = *chunk;
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(full, bytes);
    bulk_load(base, a.from + turn * a.floats, bytes, full);
  }
  if (a.bug != NO_LOAD_WAIT) mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < a.floats; i += blockDim.x) x[i] *= 2.0f;
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    semaphore_wait(&a.counters[1], turn);
    bulk_reduce_add(a.to, base, bytes);
    tma_commit();
    if (a.bug == NO_STORE_WAIT)
      x[0] = 1e30f;
    else
      tma_wait<0>();
    semaphore_set(&a.counters[1], turn + 1);
  }
#endif
}

}  // namespace
}  // namespace fasttx

extern "C" __attribute__((visibility("default"))) int emulator_bulk_add(
    const float* from, float* to, int* counters, int chunks, int floats, int bug) {
  using namespace fasttx;
  const Bulk a = {from, to, counters, floats, bug};
  return launch(bulk_add, dim3(chunks), 64, floats * 4 + 16, nullptr, a);
}
