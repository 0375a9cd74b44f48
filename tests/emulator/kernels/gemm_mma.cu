// c [M, N] = a [M, K] b [N, K]^T in fp32 by cp.async, ldmatrix and mma.sync, and the sums of c's
// rows by shuffles and atomics; tiles of 64 x 64, K by 32, two stages. a may be stored transposed.
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"

namespace fasttx {
namespace {

enum Bug { NONE, NO_WAIT, NO_BARRIER, ROW_BEYOND, DIVERGENT, HALF_BARRIER };

struct Gemm {
  const void *a, *b;
  float *c, *sums;
  int M, N, K, transposed, bug;
};

constexpr int TILE = 64, STEP = 32, PITCH = STEP + 8, PITCH_T = TILE + 8;

template <class T>
__global__ void __launch_bounds__(128) gemm_mma(const __grid_constant__ Gemm g) {
  FASTTX_SHARED(shared);
  const T *a = static_cast<const T*>(g.a), *b = static_cast<const T*>(g.b);
  T* stage_a = reinterpret_cast<T*>(shared);
  T* stage_b = stage_a + 2 * TILE * PITCH;
  float* sums = reinterpret_cast<float*>(stage_b + 2 * TILE * PITCH);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE;

  auto fetch = [&](int step) {
    T *to_a = stage_a + step % 2 * TILE * PITCH, *to_b = stage_b + step % 2 * TILE * PITCH;
    const int k0 = step * STEP;
    for (int i = thread; i < TILE * STEP / 8; i += 128) {
      const int row = i / 4, k = k0 + i % 4 * 8;
      bool valid = n0 + row < g.N && k < g.K;
      cp_async16(shared_address(to_b + row * PITCH + i % 4 * 8),
                 valid ? b + int64_t(n0 + row) * g.K + k : b, valid);
      if (!g.transposed) {
        valid = m0 + row < g.M && k < g.K;
        cp_async16(shared_address(to_a + row * PITCH + i % 4 * 8),
                   valid ? a + int64_t(m0 + row) * g.K + k : a, valid);
      } else {
        const int kt = k0 + i / 8, m = m0 + i % 8 * 8;
        valid = m < g.M && kt < g.K;
        cp_async16(shared_address(to_a + i / 8 * PITCH_T + i % 8 * 8),
                   valid ? a + int64_t(kt) * g.M + m : a, valid);
      }
    }
    cp_async_commit();
  };

  float d[8][4] = {};
  const int steps = (g.K + STEP - 1) / STEP;
  fetch(0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      fetch(step + 1);
      if (g.bug == NO_WAIT)
        cp_async_wait<2>();
      else
        cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const T *from_a = stage_a + step % 2 * TILE * PITCH,
            *from_b = stage_b + step % 2 * TILE * PITCH;
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
      uint32_t x[4];
      if (g.transposed)
        ldmatrix_x4_trans(x, shared_address(from_a + (k + lane % 8 + lane / 16 * 8) * PITCH_T +
                                            warp * 16 + lane / 8 % 2 * 8));
      else
        ldmatrix_x4(x,
                    shared_address(from_a + (warp * 16 + lane % 16) * PITCH + k + lane / 16 * 8));
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t y[4];
        ldmatrix_x4(y, shared_address(from_b + (j * 8 + lane % 8 + lane / 16 * 8) * PITCH + k +
                                      lane / 8 % 2 * 8));
        mma<T>(d[j], x, y[0], y[1]);
        mma<T>(d[j + 1], x, y[2], y[3]);
      }
    }
    if (g.bug != NO_BARRIER) __syncthreads();
  }

  for (int half = 0; half < 2; half++) {
    float sum = 0;
    for (int j = 0; j < 8; j++) sum += d[j][2 * half] + d[j][2 * half + 1];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (lane % 4 == 0) sums[warp * 16 + lane / 4 + 8 * half] = sum;
  }
  if (g.bug == DIVERGENT && lane < 16) __syncwarp();
  if (g.bug == HALF_BARRIER && warp == 1)
    barrier_sync(1, 64);
  else
    __syncthreads();
  const int rows = g.bug == ROW_BEYOND ? g.M + 1 : g.M;
  if (thread < TILE && m0 + thread < g.M) atomicAdd(&g.sums[m0 + thread], sums[thread]);
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 4; i++) {
      const int m = m0 + warp * 16 + lane / 4 + 8 * (i / 2), n = n0 + j * 8 + lane % 4 * 2 + i % 2;
      if (m < rows && n < g.N) store(&g.c[int64_t(m) * g.N + n], d[j][i]);
    }
}

}  // namespace
}  // namespace fasttx

extern "C" __attribute__((visibility("default"))) int emulator_gemm_mma(const void* a,
                                                                        const void* b, float* c,
                                                                        float* sums, int M, int N,
                                                                        int K, int is_bf16,
                                                                        int transposed, int bug) {
  using namespace fasttx;
  const Gemm g = {a, b, c, sums, M, N, K, transposed, bug};
  const dim3 grid((M + TILE - 1) / TILE, (N + TILE - 1) / TILE);
  constexpr size_t bytes = 4 * TILE * PITCH * 2 + TILE * 4;
  return launch(is_bf16 ? gemm_mma<bf16> : gemm_mma<f16>, grid, 128, bytes, nullptr, g);
}
