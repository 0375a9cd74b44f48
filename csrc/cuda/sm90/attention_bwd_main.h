// The main kernel of attention's backward on sm_90: a block takes KEYS keys of one key head through
// the tiles of rows that see them, of all query heads of its group. S^T = K Q^T and dP^T = V dO^T
// come transposed, so that P^T and dS^T are in the registers from which dV += P^T dO and dK += dS^T
// Q take them; dS goes through shared memory for dQ = dS K, whose fp32 tiles are added to global
// memory by bulk copies. Warps 0 .. 3 fetch tiles, add dq, fetch statistics and fetch the relative
// bias; two warpgroups compute, 64 keys each.
#pragma once
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/registers.h"
#include "cuda/ptx/semaphore.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/tile/careful.h"
#include "cuda/sm90/attention_bwd_pairs.h"
#include "cuda/sm90/store_tile.h"

namespace fasttx {

// Where the distances of a tile of rows are all beyond the reach of the relative bias: one such
// distance; else near.
struct Far {
  bool near;
  int distance;
};
template <int D>
FASTTX_DEVICE Far far_of(const Attention& p, const Place& at, int first_row) {
  const int reach = static_cast<int>(p.a.lut.sizes[0] / 2);
  const int origin = at.T - at.S + static_cast<int>(p.a.bias_shift);
  const int low = at.first - (first_row + BwdTile<D>::ROWS - 1) - origin;
  const int high = at.first + BWD_KEYS - 1 - first_row - origin;
  return {low < reach && high > -reach, origin + (high > 0 ? reach : -reach)};
}

FASTTX_DEVICE int64_t row_tile_of(const AttentionBwd& c, const Place& at, int rows, int tile) {
  const int first = c.p.sequences ? at.row0 / rows + at.sequence : 0;
  return (static_cast<int64_t>(at.batch) * c.p.H + at.head) * c.row_tiles + first + tile;
}

template <int D>
FASTTX_DEVICE void fetch_tiles(const AttentionBwd& c, const BwdBlock& block, uint32_t base,
                               uint32_t bars) {
  using Tile = BwdTile<D>;
  using Shared = BwdShared<D>;
  const Place& at = block.at;
  mbarrier_arrive_expect(bars + 8 * KV_FULL, 2 * Tile::K);
  const int key = at.key0 + at.first;
  load_heads<BWD_KEYS, D>(base + Shared::K, &c.k, bars + 8 * KV_FULL, key, at.kv_head, at.batch);
  load_heads<BWD_KEYS, D>(base + Shared::V, &c.v, bars + 8 * KV_FULL, key, at.kv_head, at.batch);
  uint32_t n = 0;
  for (int head = at.head; head < at.head + c.p.group; head++)
#pragma unroll 1
    for (int m = block.begin; m < block.end; m++, n++) {
      const uint32_t empty = Ring<2>::phase(n) ^ 1;
      const int s = Ring<2>::stage(n), row = at.row0 + m * Tile::ROWS;
      mbarrier_wait(bars + 8 * (Q_EMPTY + s), empty);
      mbarrier_arrive_expect(bars + 8 * (Q_FULL + s), Tile::Q);
      load_heads<Tile::ROWS, D>(base + Shared::Q + s * Tile::Q, &c.q, bars + 8 * (Q_FULL + s), row,
                                head, at.batch);
      mbarrier_wait(bars + 8 * (DOUT_EMPTY + s), empty);
      mbarrier_arrive_expect(bars + 8 * (DOUT_FULL + s), Tile::Q);
      load_heads<Tile::ROWS, D>(base + Shared::DOUT + s * Tile::Q, &c.dout,
                                bars + 8 * (DOUT_FULL + s), row, head, at.batch);
    }
}

// ordered: a tile of dq gets the shares of the blocks in the order of their keys.
template <int D>
FASTTX_DEVICE void add_dq(const AttentionBwd& c, const BwdBlock& block, uint32_t base,
                          uint32_t bars) {
  using Tile = BwdTile<D>;
  const Place& at = block.at;
  const bool ordered = c.p.a.need & ORDERED;
  const uint32_t from = base + BwdShared<D>::DQ;
  uint32_t phase = 0;
  for (int member = 0; member < c.p.group; member++)
#pragma unroll 1
    for (int m = block.begin; m < block.end; m++, phase ^= 1) {
      const int64_t tile =
          row_tile_of(c, at, Tile::ROWS, m) + static_cast<int64_t>(member) * c.row_tiles;
      const int turn =
          at.first / BWD_KEYS - visible_keys(at, m * Tile::ROWS, Tile::ROWS).begin / BWD_KEYS;
#pragma unroll
      for (int w = 0; w < 2; w++) {
        mbarrier_wait(bars + 8 * (DQ_FULL + w), phase);
        if (ordered && w == 0) semaphore_wait(c.turns + tile, turn);
        bulk_reduce_add(c.dq + tile * BWD_DQ + w * (BWD_DQ / 2), from + w * (Tile::DQ / 2),
                        Tile::DQ / 2);
        tma_commit();
      }
      tma_wait_read<1>();
      mbarrier_arrive(bars + 8 * DQ_EMPTY);
      tma_wait_read<0>();
      mbarrier_arrive(bars + 8 * (DQ_EMPTY + 1));
      if (ordered) {
        tma_wait<0>();
        semaphore_set(c.turns + tile, turn + 1);
      }
    }
}

// Rows beyond the last have the statistics of a row without keys.
template <int D, bool GENERAL>
FASTTX_DEVICE void fetch_rows(const AttentionBwd& c, const BwdBlock& block, unsigned char* shared,
                              uint32_t bars) {
  constexpr int ROWS = BwdTile<D>::ROWS;
  const Attention& p = c.p;
  const int lane = threadIdx.x % 32, rows = block.at.S;
  uint32_t n = 0;
  for (int member = 0; member < p.group; member++)
#pragma unroll 1
    for (int m = block.begin; m < block.end; m++, n++) {
      const int stage = Ring<2>::stage(n);
      auto& to = *(reinterpret_cast<BwdRows<D>*>(shared + BwdShared<D>::ROWS) + stage);
      mbarrier_wait(bars + 8 * (ROWS_EMPTY + stage), Ring<2>::phase(n) ^ 1);
      const int64_t head = statistics_of(p, block.at) + static_cast<int64_t>(member) * p.S;
#pragma unroll 1
      for (int r = lane; r < ROWS; r += 32) {
        const int i = m * ROWS + r;
        float peak = INFINITY, log_total = 0.0f, delta = 0.0f;
        if (i < rows) {
          peak = load(p.peak + head + i);
          delta = load(p.delta + head + i);
          if (GENERAL && p.two_numbers) log_total = load(p.log_total + head + i);
        }
        to.peak[r] = peak;
        to.delta[r] = delta;
        if constexpr (GENERAL) to.log_total[r] = log_total;
      }
      mbarrier_arrive(bars + 8 * (ROWS_FULL + stage));
    }
}

// The relative bias of the tiles that are near.
template <int D>
FASTTX_DEVICE void fetch_distances(const AttentionBwd& c, const BwdBlock& block,
                                   unsigned char* shared, uint32_t bars) {
  constexpr int ROWS = BwdTile<D>::ROWS;
  const Attention& p = c.p;
  uint32_t n = 0;
  for (int member = 0; member < p.group; member++)
#pragma unroll 1
    for (int m = block.begin; m < block.end; m++, n++) {
      const int stage = Ring<2>::stage(n);
      auto& to = *(reinterpret_cast<BwdRows<D>*>(shared + BwdShared<D>::ROWS) + stage);
      mbarrier_wait(bars + 8 * (ROWS_EMPTY + stage), Ring<2>::phase(n) ^ 1);
      if (p.a.table.data && far_of<D>(p, block.at, m * ROWS).near) {
        Place at = block.at;
        at.head += member;
#pragma unroll 1
        for (int d = threadIdx.x % 32; d < ROWS + BWD_KEYS - 1; d += 32)
          to.distance[d] = table_value({&p, 0.0f}, at, at.first - m * ROWS + d - (ROWS - 1));
      }
      mbarrier_arrive(bars + 8 * (ROWS_FULL + stage));
    }
}

// A thread of the two warpgroups that compute.
struct Own {
  int thread, lane;  // of the warpgroup, of the warp
  int group, warp;   // 0 .. 1, 0 .. 7
  int key;           // the warp's first
  FASTTX_DEVICE explicit Own(uint32_t x) {
    thread = x % 128;
    lane = x % 32;
    group = x / 128 - 1;
    warp = x / 32 - 4;
    key = 16 * warp;
  }
};

// Where the n-th tile of rows is. Made again where it is needed rather than kept: registers are
// short.
template <int D>
struct Step {
  uint32_t base, bars, q, dout, ds;
  int stage;
  Own own;
  FASTTX_DEVICE Step(uint32_t start, uint32_t n) : own(opaque(threadIdx.x)) {
    using Shared = BwdShared<D>;
    base = opaque(start);
    bars = base + Shared::BARRIERS;
    stage = Ring<2>::stage(n);
    q = base + Shared::Q + stage * BwdTile<D>::Q;
    dout = base + Shared::DOUT + stage * BwdTile<D>::Q;
    ds = base + Shared::DS + stage * BwdTile<D>::DS;
  }
};

template <class T, int D, bool GENERAL>
FASTTX_DEVICE void compute(const AttentionBwd& c, unsigned char* shared) {
  using Tile = BwdTile<D>;
  using Shared = BwdShared<D>;
  constexpr int ROWS = Tile::ROWS, KEYS = BWD_KEYS;
  const Attention& p = c.p;
  const uint32_t start = shared_address(shared);
  const auto& block = *reinterpret_cast<const BwdBlock*>(shared + Shared::BARRIERS + 8 * BLOCK);
  auto place_of_head = [&](int member) {
    Place at = block.at;
    at.head += member;
    return at;
  };
  auto release = [](uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  };

  float dk[D / 2], dv[D / 2];
#pragma unroll
  for (int n = 0; n < D / 2; n++) dk[n] = dv[n] = 0.0f;
  auto& keys = *reinterpret_cast<BwdKeys*>(shared + Shared::KEYS);
  auto rows_of = [&](int stage) -> const BwdRows<D>& {
    return *(reinterpret_cast<const BwdRows<D>*>(shared + Shared::ROWS) + stage);
  };
  auto bends_of = [&](const Step<D>& step) {
    return reinterpret_cast<uint32_t*>(shared + Shared::DS + step.stage * Tile::DS) +
           step.own.key * 32 + step.own.lane;
  };
  // Without what GENERAL adds.
  auto pairs_of = [&](const Place& at, int first_row, const Own& own) {
    const Range common = common_queries(at, at.first, KEYS);
    return Pairs{first_row + 2 * (own.lane % 4),
                 at.first + own.key + own.lane / 4,
                 at.first + KEYS > at.T || first_row < common.begin ||
                     first_row + ROWS > common.end,
                 {0.0f, 0.0f},
                 0.0f,
                 false};
  };
  auto buckets_of = [&](int warp) {
    return reinterpret_cast<float*>(shared + Shared::BUCKETS) +
           warp * static_cast<int>(p.a.table.sizes[0]);
  };
  mbarrier_wait(start + Shared::BARRIERS + 8 * KV_FULL, 0);

  for (int member = 0; member < p.group; member++) {
    if constexpr (GENERAL) {
      const Place at = place_of_head(member);
      const Own own(threadIdx.x);
      const int lane = own.lane;
      if (lane < 16) {
        keys.value[own.key + lane] = key_value(make_bias(p, at), at, at.first + own.key + lane);
        keys.sum[own.key + lane] = 0.0f;
      }
      if (c.table_sums)
        for (int b = lane; b < p.a.table.sizes[0]; b += 32) buckets_of(own.warp)[b] = 0.0f;
      __syncwarp();
    }
#pragma unroll 1
    for (int m = block.begin; m < block.end; m++) {
      auto taken = [&] { return member * (block.end - block.begin) + m - block.begin; };
      const Step<D> step(start, taken());
      const uint32_t bars = step.bars, phase = Ring<2>::phase(taken());
      const int stage = step.stage, group = step.own.group, lane = step.own.lane;
      const BwdRows<D>& rows = rows_of(stage);
      float s[ROWS / 2], dp[ROWS / 2];
      mbarrier_wait(bars + 8 * (Q_FULL + stage), phase);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D; k += 16)
        Wgmma<T, ROWS>::template ss<>(s, along_columns<KEYS>(step.base + Shared::K, 64 * group, k),
                                      along_columns<ROWS>(step.q, 0, k), k > 0);
      wgmma_commit();
      mbarrier_wait(bars + 8 * (DOUT_FULL + stage), phase);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D; k += 16)
        Wgmma<T, ROWS>::template ss<>(dp, along_columns<KEYS>(step.base + Shared::V, 64 * group, k),
                                      along_columns<ROWS>(step.dout, 0, k), k > 0);
      wgmma_commit();
      mbarrier_wait(bars + 8 * (ROWS_FULL + stage), phase);

      const Place at = place_of_head(member);
      Pairs x = pairs_of(at, m * ROWS, step.own);
      if constexpr (GENERAL) {
#pragma unroll
        for (int h = 0; h < 2; h++) x.key[h] = keys.value[step.own.key + lane / 4 + 8 * h];
        x.hides |= __any_sync(~0u, x.key[0] == -INFINITY || x.key[1] == -INFINITY);
        if (p.a.table.data) {
          const Far far = far_of<D>(p, at, m * ROWS);
          x.near = far.near;
          x.far = x.near ? 0.0f : table_value({&p, 0.0f}, at, far.distance);
        }
      }
      wgmma_wait<1>();
      wgmma_hold(s);
      probabilities<D, GENERAL>(s, c, at, rows, x, bends_of(step));
      wgmma_wait<0>();
      wgmma_hold(dp);
      uint32_t p16[ROWS / 16][4], ds16[ROWS / 16][4];
      if constexpr (GENERAL) {
        const Place here = place_of_head(member);
        derivatives<T, D, GENERAL>(s, dp, p16, c, here, rows_of(Step<D>(start, taken()).stage),
                                   pairs_of(here, m * ROWS, Own(opaque(threadIdx.x))));
      } else {
        derivatives<T, D, GENERAL>(s, dp, p16, c, at, rows, x);
      }
      const Step<D> again(start, taken());
      const Own& own = again.own;
      const uint32_t end = again.bars;
      release(end + 8 * (ROWS_EMPTY + again.stage));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < ROWS / 16; k++)
        Wgmma<T, D>::template rs<1>(dv, p16[k], along_rows<ROWS>(again.dout, 16 * k, 0), 1);
      wgmma_commit();

      if constexpr (GENERAL) {
        if (c.key_sums) {
          float sum[2] = {0.0f, 0.0f};
#pragma unroll
          for (int n = 0; n < ROWS / 2; n++) sum[n / 2 % 2] += dp[n];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
            if (own.lane % 4 == 0) keys.sum[own.key + own.lane / 4 + 8 * h] += sum[h];
          }
        }
        if (c.table_sums) {
          const Place here = place_of_head(member);
          const Far far = far_of<D>(p, here, m * ROWS);
          if (far.near) {
            auto* diagonals = reinterpret_cast<Diagonals*>(shared + Shared::DIAGONALS) + own.warp;
            add_to_buckets<ROWS>(dp, *diagonals, buckets_of(own.warp), {&p, 0.0f}, here, m * ROWS,
                                 here.first + own.key);
          } else {
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < ROWS / 2; n++) sum += dp[n];
            sum = warp_sum(sum);
            if (own.lane == 0)
              buckets_of(own.warp)[bucket_of({&p, 0.0f}, here, far.distance)] += sum;
            __syncwarp();
          }
        }
        if (p.cap != 0.0f) {
#pragma unroll
          for (int n = 0; n < ROWS / 2; n += 2) {
            const float2 bend = f16::unpack(bends_of(again)[at_bend(n)]);
            dp[n] *= bend.x;
            dp[n + 1] *= bend.y;
          }
          __syncwarp();
        }
      }
#pragma unroll
      for (int n = 0; n < ROWS / 2; n += 2)
        ds16[n / 8][n / 2 % 4] = T::pack(dp[n], dp[n + 1]);
#pragma unroll
      for (int k = 0; k < ROWS / 16; k++)
        stmatrix_x4(
            again.ds + at_heads<KEYS>(own.key + own.lane % 16, 16 * k + own.lane / 16 * 8),
            ds16[k]);
      fence_async();
      barrier_sync(1, 256);
      float dq[32];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < KEYS; k += 16)
        Wgmma<T, 64>::template ss<1, 1>(
            dq, along_rows<KEYS>(again.ds, k, D == 64 ? 64 * own.group : 0),
            along_rows<KEYS>(again.base + Shared::K, k, D == 64 ? 0 : 64 * own.group), k > 0);
      wgmma_commit();
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < ROWS / 16; k++)
        Wgmma<T, D>::template rs<1>(dk, ds16[k], along_rows<ROWS>(again.q, 16 * k, 0), 1);
      wgmma_commit();
      wgmma_wait<1>();
      wgmma_hold(dv);
      release(end + 8 * (DOUT_EMPTY + again.stage));
      wgmma_hold(dq);
      if (p.a.need & 1) {
        mbarrier_wait(end + 8 * (DQ_EMPTY + own.group), again.stage ^ 1);
        float* to = reinterpret_cast<float*>(shared + Shared::DQ);
#pragma unroll
        for (int n = 0; n < 8; n++) {
          Words words;
#pragma unroll
          for (int r = 0; r < 4; r++) words.w[r] = __float_as_uint(dq[4 * n + r]);
          *reinterpret_cast<Words*>(to + at_dq(own.group, n, own.thread)) = words;
        }
        fence_async();
        mbarrier_arrive(end + 8 * (DQ_FULL + own.group));
      }
      wgmma_wait<0>();
      wgmma_hold(dk);
      release(end + 8 * (Q_EMPTY + again.stage));
    }
    if constexpr (GENERAL) {
      const Place at = place_of_head(member);
      const Own own(threadIdx.x);
      const int lane = own.lane;
      __syncwarp();
      const int j = at.first + own.key + lane;
      if (c.key_sums && lane < 16 && j < at.T)
        store(c.key_sums + (int64_t{at.batch} * p.H + at.head) * p.T + at.key0 + j,
              keys.sum[own.key + lane]);
      if (c.table_sums) {
        const int count = static_cast<int>(p.a.table.sizes[0]);
        const int64_t tile =
            (int64_t{at.batch} * p.H + at.head) * c.key_tiles + block.number % c.key_tiles;
        float* to = c.table_sums + (tile * 8 + own.warp) * count;
        for (int b = lane; b < count; b += 32) store(to + b, buckets_of(own.warp)[b]);
        __syncwarp();
      }
    }
  }

  const Place at = place_of_head(0);
  const int group = Own(threadIdx.x).group;
  bool odd = false;
#pragma unroll
  for (int n = 0; n < D / 2; n++) odd |= !is_finite(dk[n]) || !is_finite(dv[n]);
  // Blocks are numbered as [B, G, key_tiles].
  if (__any_sync(~0u, odd) && threadIdx.x % 32 == 0) store(c.odd_keys + block.number, 1);
  // The tiles of rows are done with: their place serves the results.
  barrier_sync(1, 256);
  const int rest = at.T - at.first - 64 * group, first = at.key0 + at.first + 64 * group;
  unsigned char* place = shared + Shared::Q + group * 64 * D * 2;
  if (p.a.need & 2)
    store_tile<T>(p.a.dk, at.batch, at.kv_head, first, rest, p.D, dk, p.grad_scale, place,
                  2 + group);
  if (p.a.need & 4)
    store_tile<T>(p.a.dv, at.batch, at.kv_head, first, rest, p.Dv, dv, 1.0f, place, 2 + group);
}

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(384, 1)
    attention_bwd_kernel(const __grid_constant__ AttentionBwd c) {
  FASTTX_SHARED(shared);
  using Shared = BwdShared<D>;
  constexpr int GIVE = 24, TAKE = 240;
  const uint32_t base = shared_address(shared), bars = base + Shared::BARRIERS;
  auto& block = *reinterpret_cast<BwdBlock*>(shared + Shared::BARRIERS + 8 * BLOCK);
  if (threadIdx.x == 0) {
    block.number =
        c.p.a.need & ORDERED ? atomicAdd(c.ticket, 1) : static_cast<int>(blockIdx.x);
    mbarrier_init(bars + 8 * KV_FULL, 1);
    for (int s = 0; s < 2; s++) {
      mbarrier_init(bars + 8 * (Q_FULL + s), 1);
      mbarrier_init(bars + 8 * (Q_EMPTY + s), 8);
      mbarrier_init(bars + 8 * (DOUT_FULL + s), 1);
      mbarrier_init(bars + 8 * (DOUT_EMPTY + s), 8);
      mbarrier_init(bars + 8 * (ROWS_FULL + s), GENERAL ? 64 : 32);
      mbarrier_init(bars + 8 * (ROWS_EMPTY + s), 8);
      mbarrier_init(bars + 8 * (DQ_FULL + s), 128);
      mbarrier_init(bars + 8 * (DQ_EMPTY + s), 1);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  const int pair = block.number / c.key_tiles, key_tile = block.number % c.key_tiles;
  Place at;
  if (!make_place<true>(c.p, key_tile, pair % c.p.G, pair / c.p.G, BWD_KEYS, at)) return;
  if (threadIdx.x == 0) {
    constexpr int ROWS = BwdTile<D>::ROWS;
    const Range rows = visible_queries(at, at.first, BWD_KEYS);
    block.at = at;
    block.begin = rows.begin / ROWS;
    block.end = rows.end > rows.begin ? (rows.end + ROWS - 1) / ROWS : block.begin;
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp < 4) {
    registers_give<GIVE>();
    if (warp == 0 && threadIdx.x == 0) fetch_tiles<D>(c, block, base, bars);
    if (warp == 1 && threadIdx.x == 32 && (c.p.a.need & 1)) add_dq<D>(c, block, base, bars);
    if (warp == 2) fetch_rows<D, GENERAL>(c, block, shared, bars);
    if (GENERAL && warp == 3) fetch_distances<D>(c, block, shared, bars);
  } else {
    registers_take<TAKE>();
    compute<T, D, GENERAL>(c, shared);
  }
}

template <class T, int D>
int attention_bwd_main(const AttentionBwd& c, bool general, void* stream) {
  const dim3 grid(static_cast<unsigned>(c.key_tiles) * c.p.G * c.p.B);
  using Shared = BwdShared<D>;
  if (!general)
    return launch(attention_bwd_kernel<T, D, false>, grid, 384, Shared::BYTES, stream, c);
  const size_t sums = c.table_sums ? 8 * 4 * c.p.a.table.sizes[0] : 0;
  return launch(attention_bwd_kernel<T, D, true>, grid, 384,
                c.table_sums ? Shared::BUCKETS + sums : Shared::BYTES, stream, c);
}

}  // namespace fasttx
