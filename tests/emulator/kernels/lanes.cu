// One warp-wide or block-wide word a case: what each thread of 96 has afterwards.
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/memory.h"

namespace fasttx {
namespace {

enum Case {
  SHUFFLE_XOR,
  SHUFFLE_DOWN,
  SHUFFLE_UP,
  SHUFFLE_FROM,
  BALLOT,
  HALF_MASK,
  ATOMIC,
  HANDOFF,
  MATRIX_STORE,
  OUTSIDE_SHARED,
  UNALIGNED,
  EARLY_EXIT,
  MIXED
};

struct Lanes {
  int* out;
  int which;
};

__global__ void lanes(const __grid_constant__ Lanes a) {
  FASTTX_SHARED(shared);
  int* words = reinterpret_cast<int*>(shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int result = 0;
  switch (a.which) {
    case SHUFFLE_XOR:
      result = __shfl_xor_sync(~0u, thread, 5);
      break;
    case SHUFFLE_DOWN:
      result = __shfl_down_sync(~0u, thread, 3);
      break;
    case SHUFFLE_UP:
      result = __shfl_up_sync(~0u, thread, 3);
      break;
    case SHUFFLE_FROM:
      result = __shfl_sync(~0u, thread, 7);
      break;
    case BALLOT:
      result = static_cast<int>(__ballot_sync(~0u, lane % 3 == warp));
      break;
    case HALF_MASK:
      result = lane < 16 ? __shfl_xor_sync(0xffffu, thread, 1) : -1;
      break;
    case ATOMIC:
      if (thread == 0) words[0] = 0;
      __syncthreads();
      atomicAdd(&words[0], thread);
      __syncthreads();
      result = words[0];
      break;
    case HANDOFF:
      // Warp 0 hands a word to warp 1, warp 1 to warp 2, each through a barrier of its own.
      if (warp == 0) {
        words[lane] = lane;
        barrier_arrive(1, 64);
      } else if (warp == 1) {
        barrier_sync(1, 64);
        words[32 + lane] = words[lane] + 100;
        barrier_arrive(2, 64);
      } else {
        barrier_sync(2, 64);
        result = words[32 + lane] + 1000;
      }
      break;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    case MATRIX_STORE: {
      const uint32_t base = shared_address(shared) + warp * 512;
      const uint32_t words4[4] = {uint32_t(lane), uint32_t(lane + 32), uint32_t(lane + 64),
                                  uint32_t(lane + 96)};
      uint32_t back[4];
      stmatrix_x4_trans(base + lane * 16, words4);
      __syncwarp();
      ldmatrix_x4_trans(back, base + lane * 16);
      stmatrix_x4(base + lane * 16, back);
      __syncwarp();
      ldmatrix_x4(back, base + lane * 16);
      for (int i = 0; i < 4; i++) result += back[i] == words4[i];
      break;
    }
#endif
    case OUTSIDE_SHARED: {
      uint32_t r[2];
      ldmatrix_x2(r, shared_address(shared) + 2048 + 16 * lane);
      break;
    }
    case UNALIGNED:
      result = static_cast<int>(load16(a.out + 1).w[0]);
      break;
    case EARLY_EXIT:
      if (lane == 31) return;
      result = __shfl_xor_sync(~0u, thread, 1);
      break;
    case MIXED:
      result = lane < 16 ? __shfl_sync(~0u, thread, 0) : __shfl_xor_sync(~0u, thread, 1);
      break;
  }
  a.out[thread] = result;
}

}  // namespace
}  // namespace fasttx

extern "C" __attribute__((visibility("default"))) int emulator_lanes(int* out, int which) {
  using namespace fasttx;
  return launch(lanes, dim3(1), 96, 2048, nullptr, Lanes{out, which});
}
