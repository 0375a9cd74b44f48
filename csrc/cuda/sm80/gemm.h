// The product by mma.sync: tiles of 128 x 128 by 4 warps of 64 x 64, k by 32 through four stages of
// cp.async. A warp's 64 columns are two pieces of 32, half a tile apart (gemm_epilogue.h).
#pragma once
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/tile/gemm_epilogue.h"

namespace fasttx {
namespace sm80_gemm {

constexpr int SIDE = 128, STEP = 32, STAGES = 4, THREADS = 128;
constexpr int OPERAND = SIDE * STEP * 2, STAGE = 2 * OPERAND;
static_assert(STAGES * STAGE >= THREADS / 32 * STRIP_BYTES);

// Where 8 numbers of an operand's tile begin: [SIDE, STEP] by rows of 64 bytes or, transposed,
// [STEP, SIDE] by rows of 256. Eight neighbouring rows lie in different banks.
template <int TRANSPOSED>
FASTTX_DEVICE uint32_t at_tile(int outer, int k) {
  if (TRANSPOSED) return k * 256 + ((outer / 8 ^ (k & 7)) << 4);
  return outer * 64 + ((k / 8 ^ (outer >> 1 & 3)) << 4);
}

FASTTX_DEVICE int bytes_of(int count) { return 2 * max(0, min(8, count)); }
FASTTX_DEVICE void fetch8(uint32_t to, const Operand& from, int64_t at, int bytes) {
  cp_async_part(to, static_cast<const uint16_t*>(from.data) + at, bytes);
}

// SIDE x STEP of an operand from `first` and k0 on; the upper half is that of `two` from first2 on.
template <int TRANSPOSED>
FASTTX_DEVICE void fetch(uint32_t to, const Operand& one, const Operand& two, int first, int first2,
                         int k0, int K) {
  constexpr int PIECES = OPERAND / 16 / THREADS, HALF = SIDE / 2;
  if (TRANSPOSED) {
    const int column = threadIdx.x % (SIDE / 8) * 8, row = threadIdx.x / (SIDE / 8);
    const bool upper = column >= HALF;
    const Operand& from = upper ? two : one;
    const int outer = upper ? first2 + column - HALF : first + column;
    const int bytes = bytes_of(static_cast<int>(from.outer) - outer);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int k = row + i * (STEP / PIECES);
      fetch8(to + at_tile<1>(column, k), from, int64_t{k0 + k} * from.stride + outer,
             k0 + k < K ? bytes : 0);
    }
  } else {
    const int row = threadIdx.x / (STEP / 8), k = threadIdx.x % (STEP / 8) * 8;
    const int bytes = bytes_of(K - k0 - k);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const bool upper = i >= PIECES / 2;
      const Operand& from = upper ? two : one;
      const int in_half = row + i % (PIECES / 2) * (SIDE / PIECES);
      const int outer = (upper ? first2 : first) + in_half;
      fetch8(to + at_tile<0>(upper ? HALF + in_half : in_half, k), from,
             int64_t{outer} * from.stride + k0 + k,
             outer < static_cast<int>(from.outer) ? bytes : 0);
    }
  }
}

template <int TRANSPOSED>
FASTTX_DEVICE void load_a(uint32_t (&x)[4], uint32_t tile, int outer, int k, int lane) {
  if (TRANSPOSED)
    ldmatrix_x4_trans(
        x, tile + at_tile<1>(outer + lane / 8 % 2 * 8, k + lane % 8 + lane / 16 * 8));
  else
    ldmatrix_x4(x, tile + at_tile<0>(outer + lane % 16, k + lane / 16 * 8));
}
// 16 columns: y[0], y[1] of the first eight, y[2], y[3] of the others.
template <int TRANSPOSED>
FASTTX_DEVICE void load_b(uint32_t (&y)[4], uint32_t tile, int outer, int k, int lane) {
  if (TRANSPOSED)
    ldmatrix_x4_trans(y, tile + at_tile<1>(outer + lane / 16 * 8, k + lane % 16));
  else
    ldmatrix_x4(y, tile + at_tile<0>(outer + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
}

// d = the steps of a tile, by a warp's 64 x 64.
template <class T, int TA, int TB>
FASTTX_DEVICE void multiply(const Gemm& g, const Tile& t, uint32_t base, int warp, int lane,
                            float (&d)[4][8][4]) {
  const int wm = warp / 2, wn = warp % 2, each = (g.K + STEP - 1) / STEP;
  auto bring = [&](int step) {
    if (step < t.end) {
      const int second = step >= each, k = (step - second * each) * STEP;
      const uint32_t to = base + (step - t.begin) % STAGES * STAGE;
      fetch<TA>(to, g.a[second], g.a[second], t.m, t.m + SIDE / 2, k, g.K);
      fetch<TB>(to + OPERAND, g.b[second], g.b[g.gated ? 1 : second], t.n,
                g.gated ? t.n : t.n + SIDE / 2, k, g.K);
    }
    cp_async_commit();
  };

#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) bring(t.begin + i);
#pragma unroll 1
  for (int step = t.begin; step < t.end; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    bring(step + STAGES - 1);
    const uint32_t a = base + (step - t.begin) % STAGES * STAGE, b = a + OPERAND;
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
      uint32_t x[4][4];
#pragma unroll
      for (int i = 0; i < 4; i++) load_a<TA>(x[i], a, wm * 64 + i * 16, k, lane);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t y[4];
        load_b<TB>(y, b, j / 4 * (SIDE / 2) + wn * 32 + j % 4 * 8, k, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          mma<T>(d[i][j], x[i], y[0], y[1]);
          mma<T>(d[i][j + 1], x[i], y[2], y[3]);
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) gemm(const __grid_constant__ Gemm g) {
  FASTTX_SHARED(shared);
  const uint32_t base = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp / 2, wn = warp % 2;
  const Tile t = tile_of<SIDE, SIDE, STEP>(g, blockIdx.x);
  float d[4][8][4] = {};
  if (g.a[0].transposed)
    multiply<T, 1, 1>(g, t, base, warp, lane, d);
  else if (g.b[0].transposed)
    multiply<T, 0, 1>(g, t, base, warp, lane, d);
  else
    multiply<T, 0, 0>(g, t, base, warp, lane, d);
  cp_async_wait<0>();
  __syncthreads();

  float* strip = reinterpret_cast<float*>(shared + warp * STRIP_BYTES);
  const Key key = load_key(g.e.dropout);
  const int n = t.n + wn * 32, slot = t.m / SIDE * g.slots + wm;
  Sums sums = {};
#pragma unroll 1
  for (int s = 0; s < 4; s++) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i == s) fill_strip(strip, lane, [&](int f, int e) { return d[i][f][e]; });
    __syncwarp();
    finish_strip<T>(g, key, strip, lane, t.part, t.m + wm * 64 + s * 16, n, SIDE / 2, sums);
    __syncwarp();
  }
  if (g.e.dpre_sums || g.e.dgate_sums) store_sums(g, slot, lane, n, SIDE / 2, sums);
}

template <class T>
int launch(const Gemm& g, void* stream) {
  const int64_t blocks = count_tiles(g, SIDE) * g.parts;
  return fasttx::launch(gemm<T>, dim3(static_cast<unsigned>(blocks)), THREADS, STAGES * STAGE,
                        stream, g);
}

}  // namespace sm80_gemm
}  // namespace fasttx
