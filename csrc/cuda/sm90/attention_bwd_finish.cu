// Before and after the main kernel of attention's backward on sm_90.
#include "cuda/sm90/attention_bwd.h"
#include "cuda/sm90/store_tile.h"
#include "cuda/tile/careful_bwd.h"

namespace fasttx {
namespace {

__global__ void __launch_bounds__(256) attention_bwd_zeros(const __grid_constant__ AttentionBwd c) {
  char* to = reinterpret_cast<char*>(c.odd_keys);
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < c.zero16; i += gridDim.x * 256)
    store16(to + 16 * i, Words{});
}

// dq of a tile of rows from its sums.
__global__ void __launch_bounds__(256) attention_bwd_dq(const __grid_constant__ AttentionBwd c) {
  FASTTX_SHARED(shared);
  const Attention& p = c.p;
  const int tile = blockIdx.x % c.row_tiles, pair = blockIdx.x / c.row_tiles;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  Place at;
  if (!make_place<false>(p, tile, pair % p.H, pair / p.H, c.rows, at)) return;
  const float* from = c.dq + (int64_t{pair} * c.row_tiles + tile) * BWD_DQ;
  float dq[32];
  bool odd = false;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const Words words = load16_once(from + at_dq(group, n, thread));
#pragma unroll
    for (int r = 0; r < 4; r++) {
      dq[4 * n + r] = __uint_as_float(words.w[r]);
      odd |= !is_finite(dq[4 * n + r]);
    }
  }
  const bool by_rows = c.rows == 128;  // the warpgroups' shares, or by columns
  const int row = at.first + (by_rows ? 64 * group : 0), column = by_rows ? 0 : 64 * group;
  auto store_as = [&](auto type) {
    store_tile<decltype(type)>(p.a.dq, at.batch, at.head, at.row0 + row, at.S - row, p.D - column,
                               dq, p.grad_scale, shared + 8192 * group, 1 + group, column);
  };
  if (p.a.dq.dtype == FASTTX_BF16)
    store_as(bf16());
  else
    store_as(f16());
  if (__any_sync(~0u, odd) && threadIdx.x % 32 == 0) store(c.odd_rows + blockIdx.x, 1);
}

// Keys and rows of the tiles with a gradient that is not finite.
__global__ void __launch_bounds__(128, 1) attention_bwd_odd(const __grid_constant__ AttentionBwd c) {
  const Attention& p = c.p;
  const int key_tiles = p.B * p.G * c.key_tiles, warp = threadIdx.x / 32;
  const int row_tiles = p.a.need & 1 ? p.B * p.H * c.row_tiles : 0;
  Place at;
  for (int index = blockIdx.x; index < key_tiles; index += gridDim.x) {
    if (!load(c.odd_keys + index)) continue;
    const int pair = index / c.key_tiles;
    make_place<true>(p, index % c.key_tiles, pair % p.G, pair / p.G, BWD_KEYS, at);
    for (int j = at.first + warp; j < min(at.T, at.first + BWD_KEYS); j += 4)
      careful_key(p, at.sequence, at.kv_head, j);
  }
  for (int index = blockIdx.x; index < row_tiles; index += gridDim.x) {
    if (!load(c.odd_rows + index)) continue;
    const int pair = index / c.row_tiles;
    make_place<false>(p, index % c.row_tiles, pair % p.H, pair / p.H, c.rows, at);
    for (int i = at.first + warp; i < min(at.S, at.first + c.rows); i += 4)
      careful_dq(p, at.sequence, at.head, i);
  }
}

// dtable: eight warps take the parts in turn, each lane a bucket.
__global__ void __launch_bounds__(256) attention_bwd_table(const __grid_constant__ AttentionBwd c) {
  FASTTX_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [8, 32]
  const Attention& p = c.p;
  const fasttx_tensor& table = p.a.dtable;
  const int buckets = static_cast<int>(table.sizes[0]), head = blockIdx.x;
  const int bucket = blockIdx.y * 32 + threadIdx.x % 32, warp = threadIdx.x / 32;
  const int parts = c.key_tiles * 8;
  float sum = 0.0f;
  if (bucket < buckets)
    for (int b = 0; b < p.B; b++) {
      const float* from = c.table_sums + (int64_t{b} * p.H + head) * parts * buckets + bucket;
#pragma unroll 4
      for (int x = warp; x < parts; x += 8) sum += load(from + int64_t{x} * buckets);
    }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp || bucket >= buckets) return;
#pragma unroll
  for (int w = 1; w < 8; w++) sum += sums[32 * w + threadIdx.x];
  store1(table.data, table.dtype, bucket * table.strides[0] + head * table.strides[1], sum);
}

// dmask [B|1, H|1, 1, T|1]: a warp a number, its lanes the keys where they share it.
__global__ void __launch_bounds__(256) attention_bwd_mask(const __grid_constant__ AttentionBwd c) {
  const Attention& p = c.p;
  const fasttx_tensor& mask = p.a.dmask;
  const bool by_keys = mask.sizes[3] > 1;
  const int64_t count = mask.sizes[0] * mask.sizes[1] * mask.sizes[3];
  const int lane = threadIdx.x % 32;
  const int64_t warp = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  const int64_t element = by_keys ? warp * 32 + lane : warp;
  float sum = 0.0f;
  if (element < count) {
    const int64_t j = by_keys ? element % p.T : lane, pair = by_keys ? element / p.T : element;
    const int64_t head = pair % mask.sizes[1], batch = pair / mask.sizes[1];
    const int64_t heads = mask.sizes[1] == p.H ? 1 : p.H, batches = mask.sizes[0] == p.B ? 1 : p.B;
    for (int64_t b = batch; b < batch + batches; b++)
      for (int64_t h = head; h < head + heads; h++)
        for (int64_t k = j; k < p.T; k += by_keys ? p.T : 32)
          sum += load(c.key_sums + (b * p.H + h) * p.T + k);
  }
  if (!by_keys) sum = warp_sum(sum);
  if (element < count && (by_keys || lane == 0)) store1(mask.data, mask.dtype, element, sum);
}

}  // namespace

int attention_bwd_zero(const AttentionBwd& c, void* stream) {
  const int64_t blocks = (c.zero16 + 255) / 256, most = 16 * multiprocessors();
  const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
  return launch(attention_bwd_zeros, grid, 256, 0, stream, c);
}
int attention_bwd_finish(const AttentionBwd& c, void* stream) {
  const Attention& p = c.p;
  int status = cudaSuccess;
  if (p.a.need & 1) {
    const dim3 grid(static_cast<unsigned>(c.row_tiles) * p.B * p.H);
    status = launch(attention_bwd_dq, grid, 256, 16384, stream, c);
  }
  if (status == cudaSuccess && (p.a.need & 7))
    status = launch(attention_bwd_odd, dim3(4 * multiprocessors()), 128, 0, stream, c);
  if (status == cudaSuccess && c.table_sums) {
    const unsigned parts = static_cast<unsigned>((p.a.dtable.sizes[0] + 31) / 32);
    status = launch(attention_bwd_table, dim3(p.H, parts), 256, 1024, stream, c);
  }
  if (status == cudaSuccess && c.key_sums) {
    const fasttx_tensor& mask = p.a.dmask;
    const int64_t count = mask.sizes[0] * mask.sizes[1] * mask.sizes[3];
    const int64_t warps = mask.sizes[3] > 1 ? (count + 31) / 32 : count;
    const dim3 grid(static_cast<unsigned>((warps + 7) / 8));
    status = launch(attention_bwd_mask, grid, 256, 0, stream, c);
  }
  return status;
}

}  // namespace fasttx
