// The product by TMA and wgmma: tiles of 128 x 128, k by 64 through a ring of six stages. One warp
// fetches for two warpgroups that take every other tile of their block, so that the epilogue of one
// runs under the products of the other. The grid stays, tiles come to it.
#pragma once
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/registers.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/heads.h"
#include "cuda/tile/gemm_epilogue.h"

namespace fasttx {
namespace sm90_gemm {

constexpr int SIDE = 128, STEP = 64, STAGES = 6, THREADS = 384;
constexpr int OPERAND = SIDE * STEP * 2, STAGE = 2 * OPERAND, BOX = SLAB * STEP * 2;
constexpr int STRIPS = STAGES * STAGE, BARRIERS = STRIPS + 8 * STRIP_BYTES;

constexpr int NO_TENSOR_MAP = 1;  // cudaErrorInvalidValue

struct Problem {
  Gemm g;
  TensorMap a[2], b[2];  // boxes of 64 x 64
  int64_t tiles;
};

// A tile of an operand is two boxes: rows 0 .. 63 and 64 .. 127, or those columns where transposed.
template <int TRANSPOSED>
FASTTX_DEVICE void fetch(uint32_t to, const TensorMap* one, const TensorMap* two, uint32_t full,
                         int first, int first2, int k) {
  tma_load(to, one, full, TRANSPOSED ? first : k, TRANSPOSED ? k : first);
  tma_load(to + BOX, two, full, TRANSPOSED ? first2 : k, TRANSPOSED ? k : first2);
}

template <int TRANSPOSED>
FASTTX_DEVICE uint64_t matrix(uint32_t tile, int outer, int k) {
  return TRANSPOSED ? along_rows<STEP>(tile, k, outer) : along_columns<SIDE>(tile, outer, k);
}

template <class T, int TA, int TB>
__global__ void __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ Problem p) {
  FASTTX_SHARED(shared);
  const Gemm& g = p.g;
  const uint32_t base = shared_address(shared), bars = base + BARRIERS;
  auto full = [&](uint32_t s) { return bars + 8 * s; };
  auto empty = [&](uint32_t s) { return bars + 8 * (STAGES + s); };
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full(s), 1);
      mbarrier_init(empty(s), 4);  // a warp each of the warpgroup whose tile it is
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  uint32_t at = 0;  // stages of the ring so far

  if (group == 2) {
    registers_give<24>();
    if (threadIdx.x != 256) return;
    const int each = (g.K + STEP - 1) / STEP;
    for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const Tile t = tile_of<SIDE, SIDE, STEP>(g, index);
      for (int step = t.begin; step < t.end; step++, at++) {
        const uint32_t s = at % STAGES, to = base + s * STAGE;
        const int second = step >= each, k = (step - second * each) * STEP;
        mbarrier_wait(empty(s), (at / STAGES & 1) ^ 1);
        mbarrier_arrive_expect(full(s), STAGE);
        fetch<TA>(to, &p.a[second], &p.a[second], full(s), t.m, t.m + SLAB, k);
        fetch<TB>(to + OPERAND, &p.b[second], &p.b[g.gated ? 1 : second], full(s), t.n,
                  g.gated ? t.n : t.n + SLAB, k);
      }
    }
    return;
  }

  registers_take<240>();
  const Key key = load_key(g.e.dropout);
  float* strip = reinterpret_cast<float*>(shared + STRIPS + (group * 4 + warp) * STRIP_BYTES);
  // The products of a tile begin when those of the tile before are all under way: the parity of a
  // full stage tells only neighbouring rounds of the ring apart.
  auto order = [](int of) { return 1 + of; };
  if (group == 1) barrier_arrive(order(0), 256);
  int turn = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x, turn ^= 1) {
    const Tile t = tile_of<SIDE, SIDE, STEP>(g, index);
    if (turn != group) {
      at += t.end - t.begin;
      continue;
    }
    float d[2][64];
    barrier_sync(order(group), 256);
#pragma unroll 1
    for (int step = t.begin; step < t.end; step++, at++) {
      const uint32_t s = at % STAGES, a = base + s * STAGE, b = a + OPERAND;
      mbarrier_wait(full(s), at / STAGES & 1);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < STEP; k += 16)
#pragma unroll
        for (int half = 0; half < 2; half++)
          Wgmma<T, SIDE>::template ss<TA, TB>(d[half], matrix<TA>(a, half * 64, k),
                                              matrix<TB>(b, 0, k), step > t.begin || k > 0);
      wgmma_commit();
      if (step > t.begin) {
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(empty((at - 1) % STAGES));
      }
    }
    if (index + gridDim.x < p.tiles) barrier_arrive(order(group ^ 1), 256);
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(empty((at - 1) % STAGES));
    wgmma_hold(d[0]);
    wgmma_hold(d[1]);

    // Columns 32 c .. of both halves of the tile, upper and lower rows.
#pragma unroll
    for (int c = 0; c < 2; c++) {
      Sums sums = {};
#pragma unroll 1
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (i == half)
            fill_strip(strip, lane, [&](int f, int e) {
              return d[i][(f / 4 * (SIDE / 16) + 4 * c + f % 4) * 4 + e];
            });
        __syncwarp();
        finish_strip<T>(g, key, strip, lane, t.part, t.m + half * 64 + warp * 16, t.n + 32 * c,
                       SIDE / 2, sums);
        __syncwarp();
      }
      if (g.e.dpre_sums || g.e.dgate_sums)
        store_sums(g, t.m / SIDE * 4 + warp, lane, t.n + 32 * c, SIDE / 2, sums);
    }
  }
}

// False where the driver refuses.
inline bool make_map(TensorMap* map, const Gemm& g, const Operand& from) {
  const uint64_t inner = from.transposed ? from.outer : g.K, outer = from.transposed ? g.K : from.outer;
  const uint64_t sizes[] = {inner, outer}, strides[] = {static_cast<uint64_t>(from.stride) * 2};
  const uint32_t box[] = {SLAB, SLAB};
  return make_tensor_map(map, g.dtype == FASTTX_BF16 ? Element::bf16 : Element::f16, 2, from.data,
                         sizes, strides, box, Swizzle::bytes128);
}

template <class T>
int launch(const Gemm& g, void* stream) {
  Problem p = {};
  p.g = g;
  const int width = g.gated ? SIDE / 2 : SIDE;
  p.tiles = int64_t{(g.M + SIDE - 1) / SIDE} * ((g.N + width - 1) / width) * g.parts;
  for (int i = 0; i < 2; i++) {
    const bool has_a = i < g.pairs, has_b = has_a || (i == 1 && g.gated);
    if ((has_a && !make_map(&p.a[i], g, g.a[i])) || (has_b && !make_map(&p.b[i], g, g.b[i])))
      return NO_TENSOR_MAP;
  }
  const auto kernel = g.a[0].transposed  ? gemm<T, 1, 1>
                      : g.b[0].transposed ? gemm<T, 0, 1>
                                          : gemm<T, 0, 0>;
  const int64_t blocks = p.tiles < multiprocessors() ? p.tiles : multiprocessors();
  return fasttx::launch(kernel, dim3(static_cast<unsigned>(blocks)), THREADS,
                        BARRIERS + 2 * STAGES * 8, stream, p);
}

}  // namespace sm90_gemm
}  // namespace fasttx
