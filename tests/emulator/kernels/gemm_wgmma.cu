// c [M, N] (+)= a [M, K] b^T in fp32 by TMA, mbarriers and wgmma: a warpgroup fetches, one
// multiplies; two stages, tiles of 64 x COLUMNS, K by the swizzle's width. b is [N, K], or [K, N]
// where transposed.
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/registers.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"

namespace fasttx {
namespace {

enum Bug {
  NONE,
  NO_FULL_WAIT,
  NO_EMPTY_WAIT,
  NO_WGMMA_WAIT,
  WRONG_SWIZZLE,
  WRONG_BYTES,
  NO_READ_WAIT,
  NO_FENCE
};

struct Gemm {
  TensorMap a, b, c;
  int K, registers, reduce, bug;
};

template <class T, int COLUMNS, int SWIZZLE, int TRANSPOSED>
__global__ void __launch_bounds__(256, 1) gemm_wgmma(const __grid_constant__ Gemm g) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FASTTX_SHARED(shared);
  constexpr Swizzle SW = static_cast<Swizzle>(SWIZZLE);
  constexpr int WIDTH = 16 << SWIZZLE, STEP = WIDTH / 2;  // bytes, elements
  constexpr int A = 64 * WIDTH, B = COLUMNS * WIDTH, STAGE = A + B;
  const uint32_t base = shared_address(shared), bars = base + 2 * STAGE + 64 * COLUMNS * 4;
  auto full = [&](int s) { return bars + 8 * s; };
  auto empty = [&](int s) { return bars + 16 + 8 * s; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      mbarrier_init(full(s), 1);
      mbarrier_init(empty(s), 128);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  const int steps = (g.K + STEP - 1) / STEP, m0 = blockIdx.x * 64, n0 = blockIdx.y * COLUMNS;

  if (threadIdx.x >= 128) {
    registers_give<24>();
    if (threadIdx.x == 128)
      for (int step = 0; step < steps; step++) {
        const int s = step % 2;
        if (step >= 2 && g.bug != NO_EMPTY_WAIT) mbarrier_wait(empty(s), (step / 2 - 1) & 1);
        mbarrier_arrive_expect(full(s), STAGE + (g.bug == WRONG_BYTES ? 16 : 0));
        tma_load(base + s * STAGE, &g.a, full(s), step * STEP, m0);
        if (!TRANSPOSED)
          tma_load(base + s * STAGE + A, &g.b, full(s), step * STEP, n0);
        else
          for (int n = 0; n < COLUMNS; n += STEP)
            tma_load(base + s * STAGE + A + n * WIDTH, &g.b, full(s), n0 + n, step * STEP);
      }
    return;
  }

  registers_take<240>();
  float d[COLUMNS / 2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Swizzle claimed = g.bug == WRONG_SWIZZLE ? Swizzle::none : SW;
  for (int step = 0; step < steps; step++) {
    const int s = step % 2;
    if (g.bug != NO_FULL_WAIT) mbarrier_wait(full(s), step / 2 & 1);
    const uint32_t a = base + s * STAGE, b = a + A;
    // Every 16 of K with its own words of a: they are read while the next are loaded.
    uint32_t x[STEP / 16][4];
    if (g.registers)
      for (int k = 0; k < STEP; k += 16) {
        const uint32_t at = a + (warp * 16 + lane % 16) * WIDTH + k * 2 + lane / 16 * 16;
        ldmatrix_x4(x[k / 16], at ^ ((at >> 7 & ((1 << SWIZZLE) - 1)) << 4));
      }
    if (g.bug != NO_FENCE) wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
      const int accumulate = step > 0 || k > 0;
      const uint64_t y = TRANSPOSED
                             ? matrix_descriptor(b + k * WIDTH, claimed, 8 * WIDTH, STEP * WIDTH)
                             : matrix_descriptor(b + k * 2, claimed, 8 * WIDTH);
      if (g.registers)
        Wgmma<T, COLUMNS>::template rs<TRANSPOSED>(d, x[k / 16], y, accumulate);
      else
        Wgmma<T, COLUMNS>::template ss<0, TRANSPOSED>(
            d, matrix_descriptor(a + k * 2, claimed, 8 * WIDTH), y, accumulate);
    }
    wgmma_commit();
    if (g.bug != NO_WGMMA_WAIT || step + 1 == steps) wgmma_wait<0>();
    mbarrier_arrive(empty(s));
  }

  float* tile = reinterpret_cast<float*>(shared + 2 * STAGE);
  for (int i = 0; i < COLUMNS / 2; i++) {
    const int row = warp * 16 + lane / 4 + 8 * (i / 2 % 2),
              column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    tile[row * COLUMNS + column] = d[i];
  }
  fence_async();
  barrier_sync(1, 128);
  if (threadIdx.x == 0) {
    if (g.reduce)
      tma_reduce_add(&g.c, base + 2 * STAGE, n0, m0);
    else
      tma_store(&g.c, base + 2 * STAGE, n0, m0);
    tma_commit();
    if (g.bug != NO_READ_WAIT)
      tma_wait_read<0>();
    else
      tile[0] = 1e30f;
  }
#endif
}

template <class T, int COLUMNS, int SWIZZLE, int TRANSPOSED>
int gemm(const void* a, const void* b, float* c, int M, int N, int K, int registers, int reduce,
         int bug) {
  constexpr uint32_t WIDTH = 16 << SWIZZLE, STEP = WIDTH / 2;
  constexpr Swizzle SW = static_cast<Swizzle>(SWIZZLE);
  constexpr Element element = T::is_bf16 ? Element::bf16 : Element::f16;
  Gemm g = {{}, {}, {}, K, registers, reduce, bug};
  const uint64_t size_a[] = {uint64_t(K), uint64_t(M)}, stride_a[] = {uint64_t(K) * 2};
  const uint32_t box_a[] = {STEP, 64};
  const uint64_t outer = TRANSPOSED ? K : N, inner = TRANSPOSED ? N : K;
  const uint64_t size_b[] = {inner, outer}, stride_b[] = {inner * 2};
  const uint32_t box_b[] = {STEP, TRANSPOSED ? STEP : COLUMNS};
  const uint64_t size_c[] = {uint64_t(N), uint64_t(M)}, stride_c[] = {uint64_t(N) * 4};
  const uint32_t box_c[] = {COLUMNS, 64};
  if (!make_tensor_map(&g.a, element, 2, a, size_a, stride_a, box_a, SW) ||
      !make_tensor_map(&g.b, element, 2, b, size_b, stride_b, box_b, SW) ||
      !make_tensor_map(&g.c, Element::f32, 2, c, size_c, stride_c, box_c, Swizzle::none))
    return -1;
  constexpr size_t bytes = 2 * (64 + COLUMNS) * WIDTH + 64 * COLUMNS * 4 + 32;
  return launch(gemm_wgmma<T, COLUMNS, SWIZZLE, TRANSPOSED>,
                dim3((M + 63) / 64, (N + COLUMNS - 1) / COLUMNS), 256, bytes, nullptr, g);
}

}  // namespace
}  // namespace fasttx

extern "C" __attribute__((visibility("default"))) int emulator_gemm_wgmma(
    const void* a, const void* b, float* c, int M, int N, int K, int is_bf16, int columns,
    int swizzle, int transposed, int registers, int reduce, int bug) {
  using namespace fasttx;
#define CASE(COLUMNS, SWIZZLE, TRANSPOSED)                                                         \
  if (columns == COLUMNS && swizzle == SWIZZLE && transposed == TRANSPOSED)                        \
    return is_bf16 ? gemm<bf16, COLUMNS, SWIZZLE, TRANSPOSED>(a, b, c, M, N, K, registers, reduce, \
                                                              bug)                                 \
                   : gemm<f16, COLUMNS, SWIZZLE, TRANSPOSED>(a, b, c, M, N, K, registers, reduce,  \
                                                             bug);
  CASE(64, 3, 0)
  CASE(64, 2, 0)
  CASE(64, 1, 0)
  CASE(128, 3, 1)
  CASE(64, 2, 1)
  CASE(64, 1, 1)
  CASE(192, 3, 0)
  CASE(256, 2, 0)
#undef CASE
  return -2;
}
