// The product by TMA and wgmma: tiles of 128 rows, k by 64 through a ring of stages that one warp
// fetches for two warpgroups. Tiles of 128 columns: the warpgroups take every other tile of their
// block, so that the epilogue of one runs under the products of the other. Tiles of 256 columns,
// which read a quarter less: 64 rows each. The grid stays, tiles come to it.
#pragma once
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/registers.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/heads.h"
#include "cuda/tile/gemm_epilogue.h"

namespace fasttx {
namespace sm90_gemm {

constexpr int ROWS = 128, STEP = 64, THREADS = 384, BOX = SLAB * STEP * 2;
constexpr int RING = 192 << 10, BARRIERS = RING + 8 * STRIP_BYTES;
constexpr int NO_TENSOR_MAP = 1;  // cudaErrorInvalidValue

template <int COLUMNS>
struct Shape {
  static constexpr bool SHARED = COLUMNS == 256;  // the warpgroups share a tile
  static constexpr int BLOCKS = SHARED ? 1 : 2;   // of 64 rows, a warpgroup's
  static constexpr int A = ROWS * STEP * 2, STAGE = A + COLUMNS * STEP * 2;
  static constexpr int STAGES = RING / STAGE;
  static constexpr size_t BYTES = BARRIERS + 2 * STAGES * 8;
  static FASTTX_DEVICE uint32_t full(uint32_t bars, uint32_t s) { return bars + 8 * s; }
  static FASTTX_DEVICE uint32_t empty(uint32_t bars, uint32_t s) { return bars + 8 * (STAGES + s); }
};

struct Problem {
  Gemm g;
  TensorMap a[2], b[2];  // boxes of 64 x 64
  int64_t tiles;
};

FASTTX_DEVICE void fetch(uint32_t to, const TensorMap* map, uint32_t full, int transposed,
                         int outer, int k) {
  tma_load(to, map, full, transposed ? outer : k, transposed ? k : outer);
}

// Boxes lie one after the other: rows on rows or, transposed, slabs of columns.
template <int TRANSPOSED, int OUTER>
FASTTX_DEVICE uint64_t matrix(uint32_t tile, int outer, int k) {
  return TRANSPOSED ? along_rows<STEP>(tile, k, outer) : along_columns<OUTER>(tile, outer, k);
}

// d = the steps of a tile, by a warpgroup's rows from `row` on; at: stages of the ring so far. A
// stage is given back when the next one's products are under way.
template <class T, int TA, int TB, int COLUMNS>
FASTTX_DEVICE void multiply(const Tile& t, uint32_t base, uint32_t bars, int row, int lane,
                            uint32_t& at, float (&d)[Shape<COLUMNS>::BLOCKS][COLUMNS / 2]) {
  using S = Shape<COLUMNS>;
#pragma unroll 1
  for (int step = t.begin; step < t.end; step++, at++) {
    const uint32_t s = at % S::STAGES, a = base + s * S::STAGE, b = a + S::A;
    mbarrier_wait(S::full(bars, s), at / S::STAGES & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEP; k += 16)
#pragma unroll
      for (int i = 0; i < S::BLOCKS; i++)
        Wgmma<T, COLUMNS>::template ss<TA, TB>(d[i], matrix<TA, ROWS>(a, row + i * 64, k),
                                               matrix<TB, COLUMNS>(b, 0, k),
                                               step > t.begin || k > 0);
    wgmma_commit();
    if (step > t.begin) {
      wgmma_wait<1>();
      if (lane == 0) mbarrier_arrive(S::empty(bars, (at - 1) % S::STAGES));
    }
  }
}

template <class T, int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ Problem p) {
  using S = Shape<COLUMNS>;
  FASTTX_SHARED(shared);
  const Gemm& g = p.g;
  const uint32_t base = shared_address(shared), bars = base + BARRIERS;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::STAGES; s++) {
      mbarrier_init(S::full(bars, s), 1);
      mbarrier_init(S::empty(bars, s), S::SHARED ? 8 : 4);  // the warps whose tile it is
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
      const Tile t = tile_of<ROWS, COLUMNS, STEP>(g, index);
      for (int step = t.begin; step < t.end; step++, at++) {
        const uint32_t s = at % S::STAGES, a = base + s * S::STAGE, b = a + S::A;
        const int second = step >= each, k = (step - second * each) * STEP;
        mbarrier_wait(S::empty(bars, s), (at / S::STAGES & 1) ^ 1);
        mbarrier_arrive_expect(S::full(bars, s), S::STAGE);
#pragma unroll
        for (int i = 0; i < ROWS / SLAB; i++)
          fetch(a + i * BOX, &p.a[second], S::full(bars, s), g.a[0].transposed, t.m + i * SLAB, k);
#pragma unroll
        for (int i = 0; i < COLUMNS / SLAB; i++) {
          const bool gate = g.gated && i >= COLUMNS / SLAB / 2;
          fetch(b + i * BOX, &p.b[gate ? 1 : second], S::full(bars, s), g.b[0].transposed,
                t.n + (gate ? i - COLUMNS / SLAB / 2 : i) * SLAB, k);
        }
      }
    }
    return;
  }

  registers_take<240>();
  const Key key = load_key(g.e.dropout);
  float* strip = reinterpret_cast<float*>(shared + RING + (group * 4 + warp) * STRIP_BYTES);
  // Of two tiles, the products of the second begin when those of the first are all under way: the
  // parity of a full stage tells only neighbouring rounds of the ring apart.
  auto order = [](int of) { return 1 + of; };
  if (!S::SHARED && group == 1) barrier_arrive(order(0), 256);
  int turn = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x, turn ^= 1) {
    const Tile t = tile_of<ROWS, COLUMNS, STEP>(g, index);
    if (!S::SHARED && turn != group) {
      at += t.end - t.begin;
      continue;
    }
    const int row = S::SHARED ? group * 64 : 0;
    float d[S::BLOCKS][COLUMNS / 2];
    if (!S::SHARED) barrier_sync(order(group), 256);
    if (g.a[0].transposed)
      multiply<T, 1, 1, COLUMNS>(t, base, bars, row, lane, at, d);
    else if (g.b[0].transposed)
      multiply<T, 0, 1, COLUMNS>(t, base, bars, row, lane, at, d);
    else
      multiply<T, 0, 0, COLUMNS>(t, base, bars, row, lane, at, d);
    if (!S::SHARED && index + gridDim.x < p.tiles) barrier_arrive(order(group ^ 1), 256);
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(S::empty(bars, (at - 1) % S::STAGES));
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++) wgmma_hold(d[i]);

    // Columns 32 c .. of both halves of the tile, of one block of rows after the other.
    Sums sums = {};
#pragma unroll 1
    for (int n = 0; n < 4; n++) {
      const int block = n % S::BLOCKS, column = n / S::BLOCKS * 32;
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i == n)
          fill_strip(strip, lane, [&](int f, int e) {
            return d[i % S::BLOCKS]
                    [(f / 4 * (COLUMNS / 16) + i / S::BLOCKS * 4 + f % 4) * 4 + e];
          });
      __syncwarp();
      finish_strip<T>(g, key, strip, lane, t.part, t.m + row + block * 64 + warp * 16,
                      t.n + column, COLUMNS / 2, sums);
      __syncwarp();
      if (block == S::BLOCKS - 1 && (g.e.dpre_sums || g.e.dgate_sums)) {
        store_sums(g, t.m / ROWS * g.slots + (S::SHARED ? group * 4 : 0) + warp, lane,
                   t.n + column, COLUMNS / 2, sums);
        sums = {};
      }
    }
  }
}

// False where the driver refuses.
inline bool make_map(TensorMap* map, const Gemm& g, const Operand& from) {
  const uint64_t inner = from.transposed ? from.outer : g.K,
                 outer = from.transposed ? g.K : from.outer;
  const uint64_t sizes[] = {inner, outer}, strides[] = {static_cast<uint64_t>(from.stride) * 2};
  const uint32_t box[] = {SLAB, SLAB};
  return make_tensor_map(map, g.dtype == FASTTX_BF16 ? Element::bf16 : Element::f16, 2, from.data,
                         sizes, strides, box, Swizzle::bytes128);
}

template <class T, int COLUMNS>
int launch(const Gemm& g, void* stream) {
  Problem p = {};
  p.g = g;
  p.tiles = count_tiles(g, COLUMNS) * g.parts;
  for (int i = 0; i < 2; i++) {
    const bool has_a = i < g.pairs, has_b = has_a || (i == 1 && g.gated);
    if ((has_a && !make_map(&p.a[i], g, g.a[i])) || (has_b && !make_map(&p.b[i], g, g.b[i])))
      return NO_TENSOR_MAP;
  }
  const int64_t blocks = p.tiles < multiprocessors() ? p.tiles : multiprocessors();
  return fasttx::launch(gemm<T, COLUMNS>, dim3(static_cast<unsigned>(blocks)), THREADS,
                        Shape<COLUMNS>::BYTES, stream, p);
}

template <class T>
int launch(const Gemm& g, void* stream) {
  return g.columns == 256 ? launch<T, 256>(g, stream) : launch<T, 128>(g, stream);
}

}  // namespace sm90_gemm
}  // namespace fasttx
