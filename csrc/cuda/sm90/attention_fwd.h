// Attention forward for sm_90a: a producer warp fetches by TMA, consumer warpgroups of 64 queries
// multiply by wgmma. S = Q K^T of a block of keys and O += P V of the block before are under way
// together, and the warpgroups take turns: one's softmax runs under the others' products. Blocks of
// keys go from the last to the first. A block of threads stays for many tiles.
#pragma once
#include <type_traits>

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/registers.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/attention_bias.h"
#include "cuda/sm90/heads.h"
#include "cuda/tile/careful.h"
#include "cuda/tile/keep.h"
#include "cuda/tile/softcap.h"

namespace fasttx {

struct ForwardSm90 {
  HeadsMap q, k, v, out;
  Attention p;
  int tiles, section, works, rounds;
  int tma_out;  // whether TMA can write out
  int hides;    // whether a loaded key can be hidden from a query
};

// DROPPED: dropout, and perhaps a bias; of 256 columns a bias alone too.
enum Variant { PLAIN, BIASED, DROPPED };

// A thread of the consumers holds S, P and O: that bounds the tiles.
template <int D, Variant VARIANT>
struct Shape {
  static constexpr int GROUPS = 2, KEYS = D > (VARIANT == DROPPED ? 64 : 128) ? 64 : 128;
  static constexpr int STAGES = 2, GIVE = 40, TAKE = 232;
};
template <>
struct Shape<64, PLAIN> {
  static constexpr int GROUPS = 3, KEYS = 128, STAGES = 4, GIVE = 32, TAKE = 160;
};

// Shared memory, by offsets.
template <int D, Variant VARIANT>
struct Layout : Shape<D, VARIANT> {
  using Size = Shape<D, VARIANT>;
  using Size::GROUPS, Size::KEYS, Size::STAGES;
  using Tile = BiasOfGroup<KEYS>;
  static constexpr int ROWS = 64 * GROUPS, THREADS = 128 * (GROUPS + 1), BARRIERS = 4 * STAGES + 1;
  static constexpr int Q_BYTES = ROWS * D * 2, STAGE = KEYS * D * 2;
  static constexpr int BIAS_BYTES = VARIANT == PLAIN ? 0 : GROUPS * sizeof(Tile);
  static constexpr int REST = BIAS_BYTES + 16 * GROUPS + 8 * BARRIERS;
  // Where out has room of its own the next Q comes under it, else it replaces Q.
  static constexpr bool OWN_OUT = 2 * Q_BYTES + 2 * STAGES * STAGE + REST <= 227 << 10;
  static constexpr int Q = 0, K = Q_BYTES, V = K + STAGES * STAGE;
  static constexpr int OUT = OWN_OUT ? V + STAGES * STAGE : Q;
  static constexpr int BIAS = V + STAGES * STAGE + (OWN_OUT ? Q_BYTES : 0);
  static constexpr int FLAGS = BIAS + BIAS_BYTES, Q_EMPTY = FLAGS + 16 * GROUPS;
  static constexpr int K_FULL = Q_EMPTY + 8, K_EMPTY = K_FULL + 8 * STAGES;
  static constexpr int V_FULL = K_EMPTY + 8 * STAGES, V_EMPTY = V_FULL + 8 * STAGES;
  static constexpr int BYTES = V_EMPTY + 8 * STAGES;
  static_assert(STAGE % 1024 == 0 && BYTES <= 227 << 10);
  // What the launch gives a block is all there is to take.
  static_assert(Size::GIVE + GROUPS * Size::TAKE <= 65536 / THREADS / 8 * 8 * (GROUPS + 1));
  // Philox takes longer than the products: nothing is gained where they overlap. A bias beside O of
  // 256 columns has no registers for it.
  static constexpr bool OVERLAP = VARIANT == PLAIN || (VARIANT == BIASED && D <= 128);
  static constexpr bool TURNS = OVERLAP && D <= 128;
  static constexpr int TURN = 1, MEET = TURN + GROUPS;  // named barriers, a warpgroup each
};

struct Turn {
  int tile, pair;
};
// All tiles of some heads, whose keys and values fit the cache together, run together; under a
// causal band the longest first.
FASTTX_DEVICE Turn turn_of(const ForwardSm90& f, int index) {
  const int section = index / (f.section * f.tiles);
  const int inside = index - section * (f.section * f.tiles);
  const int width = min(f.section, f.p.B * f.p.H - section * f.section);
  const int tile = inside / width;
  const bool reverse = f.p.right != UNBOUNDED && !f.p.sequences;
  return {reverse ? f.tiles - 1 - tile : tile, section * f.section + inside % width};
}

// The block's work of a round: back and forth, so that none has the longest of every round. It may
// be beyond the last.
FASTTX_DEVICE int work_of(int round) {
  const int at = static_cast<int>(round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  return round * static_cast<int>(gridDim.x) + at;
}

template <class L>
FASTTX_DEVICE bool tile_place(const ForwardSm90& f, int index, Place& at) {
  const Turn turn = turn_of(f, index);
  return make_place<false>(f.p, turn.tile, turn.pair % f.p.H, turn.pair / f.p.H, L::ROWS, at);
}
struct Work {
  Place at;
  int first, blocks;  // of keys: first .. first + blocks - 1
};
// By a whole warp. False: no rows.
template <class L, Variant VARIANT>
FASTTX_DEVICE bool find_work(const ForwardSm90& f, int index, Work& work) {
  Place& at = work.at;
  if (index >= f.works || !tile_place<L>(f, index, at)) return false;
  Range keys = visible_keys(at, at.first, L::ROWS);
  if constexpr (VARIANT != PLAIN) keys = shown_keys(make_bias(f.p, at), at, keys);
  work.first = keys.begin / L::KEYS;
  work.blocks = keys.end > keys.begin ? (keys.end - 1) / L::KEYS - work.first + 1 : 0;
  return true;
}

// A warp, of which one thread issues.
template <int D, Variant VARIANT>
FASTTX_DEVICE void produce(const ForwardSm90& f, uint32_t base) {
  using L = Layout<D, VARIANT>;
  using Stages = Ring<L::STAGES>;
  uint32_t tiles = 0, blocks = 0;
  Work work;
  for (int round = 0; round < f.rounds; round++) {
    if (!find_work<L, VARIANT>(f, work_of(round), work) || threadIdx.x || !work.blocks) continue;
    const Place& at = work.at;
    auto fetch = [&](const HeadsMap* map, int to, int full, int empty, uint32_t n, int block,
                     int more = 0) {
      const int stage = Stages::stage(n);
      mbarrier_wait(base + empty + 8 * stage, Stages::phase(n) ^ 1);
      mbarrier_arrive_expect(base + full + 8 * stage, L::STAGE + more);
      load_heads<L::KEYS, D>(base + to + stage * L::STAGE, map, base + full + 8 * stage,
                             at.key0 + block * L::KEYS, at.kv_head, at.batch);
    };
    const int last = work.first + work.blocks - 1;
    // Q comes with the first keys.
    fetch(&f.k, L::K, L::K_FULL, L::K_EMPTY, blocks, last, L::Q_BYTES);
    mbarrier_wait(base + L::Q_EMPTY, Ring<1>::phase(tiles) ^ 1);
    load_heads<L::ROWS, D>(base + L::Q, &f.q, base + L::K_FULL + 8 * Stages::stage(blocks),
                           at.row0 + at.first, at.head, at.batch);
    tiles++;
#pragma unroll 1
    for (int block = last; block >= work.first; block--) {
      if (block > work.first) fetch(&f.k, L::K, L::K_FULL, L::K_EMPTY, blocks + 1, block - 1);
      fetch(&f.v, L::V, L::V_FULL, L::V_EMPTY, blocks, block);
      blocks++;
    }
  }
}

// A warpgroup of the consumers: 64 queries of each tile.
template <class T, int D, Variant VARIANT>
struct Consumer {
  using L = Layout<D, VARIANT>;
  using Stages = Ring<L::STAGES>;
  static constexpr int KEYS = L::KEYS, COLUMNS = KEYS / 8;

  const ForwardSm90& f;
  const uint32_t base;
  unsigned char* const shared;
  uint32_t blocks = 0;  // of keys, so far

  FASTTX_DEVICE Consumer(const ForwardSm90& f, uint32_t base, unsigned char* shared)
      : f(f), base(base), shared(shared) {}

  // Who a thread is: row g and g + 8, g = lane / 4, of a warp's 16, columns 2 quad, + 1 of every 8.
  struct Me {
    const int x = opaque(threadIdx.x);
    const int group = x / 128 - 1, thread = x % 128, warp = thread / 32, lane = x % 32;
    const int quad = lane % 4, row = 64 * group + 16 * warp + lane / 4;
    FASTTX_DEVICE int next() const { return x / 128 % L::GROUPS; }  // the group after this one
  };

  FASTTX_DEVICE void meet(const Me& me) { barrier_sync(L::MEET + me.group, 128); }
  FASTTX_DEVICE void wait(int full, uint32_t n) {
    mbarrier_wait(base + full + 8 * Stages::stage(n), Stages::phase(n));
  }
  FASTTX_DEVICE void release(int empty, uint32_t n) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(base + empty + 8 * Stages::stage(n));
  }

  FASTTX_DEVICE void start_scores(const Me& me, float (&s)[KEYS / 2], uint32_t n) {
    const uint32_t k = base + L::K + Stages::stage(n) * L::STAGE;
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < D; c += 16)
      Wgmma<T, KEYS>::template ss<>(s, along_columns<L::ROWS>(base + L::Q, 64 * me.group, c),
                                    along_columns<KEYS>(k, 0, c), c > 0);
    wgmma_commit();
  }
  FASTTX_DEVICE void start_values(float (&o)[D / 2], const uint32_t (&p)[KEYS / 16][4],
                                  uint32_t n) {
    const uint32_t v = base + L::V + Stages::stage(n) * L::STAGE;
    wgmma_fence();
#pragma unroll
    for (int r = 0; r < KEYS; r += 16)
      Wgmma<T, D>::template rs<1>(o, p[r / 16], along_rows<KEYS>(v, r, 0), 1);
    wgmma_commit();
  }

  // Of the thread's two rows, in units of log2(e), PLAIN before scaling.
  struct Rows {
    float top[2], sum[2], decay[2];
  };

  // The keys that they see by the band: low (+ 8) .. high.
  struct Limits {
    int low, high[2];
  };

  // S becomes P, not normalized; decay: what O of the blocks before is worth.
  FASTTX_DEVICE void softmax(const Place& at, const Limits& see, const Bias& bias,
                             const BiasParts& parts, Key key, int block, float (&s)[KEYS / 2],
                             Rows& rows) {
    const Me me;
    const Attention& p = f.p;
    const int j0 = block * KEYS;
    if constexpr (VARIANT != PLAIN) {
      const auto& tile = reinterpret_cast<const typename L::Tile*>(shared + L::BIAS)[me.group];
      add_parts(s, tile, parts, bias, me.row % 64, 2 * me.quad);
    }
    if (see.low + 8 > j0 || see.high[0] < j0 + KEYS - 1) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int low = see.low + 8 * h - j0 - 2 * me.quad, high = see.high[h] - j0 - 2 * me.quad;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (8 * n + e < low || 8 * n + e > high) s[4 * n + 2 * h + e] = -INFINITY;
      }
    }
    const float unit = VARIANT == PLAIN ? p.scale : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = rows.top[h];
#pragma unroll
      for (int n = 0; n < COLUMNS; n++)
        top = fmaxf(top, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float shift = top == -INFINITY ? 0.0f : top * unit;
      rows.decay[h] = exp2_approx(rows.top[h] * unit - shift);
      rows.top[h] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < COLUMNS; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& y = s[4 * n + 2 * h + e];
          y = exp2_approx(VARIANT == PLAIN ? fmaf(y, unit, -shift) : y - shift);
          sum += y;
        }
      rows.sum[h] = fmaf(rows.sum[h], rows.decay[h], sum);
    }
    if (VARIANT == DROPPED && p.dropout.threshold) {
#pragma unroll
      for (int n = 0; n < COLUMNS; n += 4) {
        KeepRows<4> keep;
        keep.make(p.dropout, key, at.first + me.row, j0 + 8 * n, at.head, at.sequence);
#pragma unroll
        for (int x = 0; x < 16; x++)
          if (!keep.kept(x / 4, x / 2 % 2, x % 2)) s[4 * n + x] = 0.0f;
      }
    }
  }
  FASTTX_DEVICE void rescale(float (&o)[D / 2], const Rows& rows) {
#pragma unroll
    for (int x = 0; x < D / 2; x++) o[x] *= rows.decay[x / 2 % 2];
  }
  FASTTX_DEVICE void pack(uint32_t (&p)[KEYS / 16][4], const float (&s)[KEYS / 2]) {
#pragma unroll
    for (int x = 0; x < KEYS / 4; x++) p[x / 4][x % 4] = T::pack(s[2 * x], s[2 * x + 1]);
  }
  // While products are under way.
  FASTTX_DEVICE BiasParts stage(const Place& at, const Bias& bias, int block) {
    BiasParts parts = {};
    if constexpr (VARIANT != PLAIN) {
      const Me me;
      const int i0 = at.first + 64 * me.group;
      parts = parts_of<KEYS>(bias, at, i0, block * KEYS);
      if (parts.keys || parts.distances || f.p.mask == MASK_PAIRS) {
        auto& tile = reinterpret_cast<typename L::Tile*>(shared + L::BIAS)[me.group];
        meet(me);
        stage_parts(tile, parts, bias, at, i0, block * KEYS, me.thread);
        meet(me);
      }
    }
    return parts;
  }

  FASTTX_DEVICE void tile(int round, const Work& work, Key key) {
    const Me me;
    const Place& at = work.at;
    Bias bias;
    if constexpr (VARIANT != PLAIN) bias = make_bias(f.p, at);
    float s[KEYS / 2], o[D / 2];
    uint32_t p[KEYS / 16][4];
    Rows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {}};
#pragma unroll
    for (int x = 0; x < D / 2; x++) o[x] = 0.0f;

    const int i = at.first + me.row;
    const Limits see = {i + at.low, {min(at.T - 1, i + at.high), min(at.T - 1, i + 8 + at.high)}};
    int block = work.first + work.blocks;
    if (!L::OVERLAP) {
#pragma unroll 1
      while (block-- > work.first) {
        wait(L::K_FULL, blocks);
        start_scores(me, s, blocks);
        const BiasParts parts = stage(at, bias, block);
        wgmma_wait<0>();
        release(L::K_EMPTY, blocks);
        softmax(at, see, bias, parts, key, block, s, rows);
        rescale(o, rows);
        pack(p, s);
        wait(L::V_FULL, blocks);
        start_values(o, p, blocks);
        wgmma_wait<0>();
        release(L::V_EMPTY, blocks++);
      }
      if (L::OWN_OUT && work.blocks && me.lane == 0) mbarrier_arrive(base + L::Q_EMPTY);
    } else if (block-- > work.first) {
      wait(L::K_FULL, blocks);
      start_scores(me, s, blocks);
      BiasParts parts = stage(at, bias, block);
      wgmma_wait<0>();
      release(L::K_EMPTY, blocks);
      softmax(at, see, bias, parts, key, block, s, rows);
      pack(p, s);
#pragma unroll 1
      while (block-- > work.first) {
        wait(L::K_FULL, blocks + 1);
        if (L::TURNS) barrier_sync(L::TURN + me.group, 256);
        start_scores(me, s, blocks + 1);
        wait(L::V_FULL, blocks);
        start_values(o, p, blocks);
        if (L::TURNS) barrier_arrive(L::TURN + Me().next(), 256);
        parts = stage(at, bias, block);
        wgmma_wait<1>();
        release(L::K_EMPTY, blocks + 1);
        softmax(at, see, bias, parts, key, block, s, rows);
        wgmma_wait<0>();
        release(L::V_EMPTY, blocks++);
        rescale(o, rows);
        pack(p, s);
      }
      if (L::OWN_OUT && me.lane == 0) mbarrier_arrive(base + L::Q_EMPTY);
      wait(L::V_FULL, blocks);
      start_values(o, p, blocks);
      wgmma_wait<0>();
      release(L::V_EMPTY, blocks++);
    }
    finish(round, work.blocks, o, rows);
  }

  FASTTX_DEVICE void finish(int round, bool any, float (&o)[D / 2], Rows& rows) {
    const Me me;
    Place at;
    tile_place<L>(f, work_of(opaque(round)), at);
    const int i0 = at.first + 64 * me.group, mine = i0 + 16 * me.warp;  // first rows
    const float unit = VARIANT == PLAIN ? f.p.scale : 1.0f;
    bool careful = false;
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = rows.sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[h] = sum == 0.0f ? 0.0f : f.p.dropout.scale / sum;
      rows.top[h] *= unit;
      rows.sum[h] = log2f(sum);
      const int i = at.first + me.row + 8 * h;
      if (me.quad == 0 && i < at.S) {
        float lse = fmaf(rows.sum[h], LN2, rows.top[h] * LN2);
        if (rows.top[h] == LOWEST) lse = LOWEST;
        if (sum == 0.0f) lse = -INFINITY;
        store(static_cast<float*>(f.p.a.lse.data) + at.batch * f.p.a.lse.strides[0] +
                  at.head * f.p.a.lse.strides[1] + (at.row0 + i) * f.p.a.lse.strides[2],
              lse);
      }
    }
    if (!any) {  // and Q's place may hold the next tile's
      store_rows(me, at, [](int, int) { return uint16_t{0}; });
      return;
    }
    // What is hidden has met O as 0 times itself.
    if (f.hides) {
#pragma unroll
      for (int x = 0; x < D / 2; x++) careful |= !(fabsf(o[x]) < INFINITY);
      careful = __any_sync(~0u, careful);
    }
    auto* flags = reinterpret_cast<int*>(shared + L::FLAGS) + 4 * me.group;
    if (me.thread == 0) tma_wait_read<0>();  // of the tile before
    meet(me);
    if (me.lane == 0) flags[me.warp] = careful;
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t words[4];
#pragma unroll
      for (int x = 0; x < 4; x++)
        words[x] =
            T::pack(o[4 * n + 2 * x] * inverse[x % 2], o[4 * n + 2 * x + 1] * inverse[x % 2]);
      stmatrix_x4(base + L::OUT + at_heads<L::ROWS>(64 * me.group + 16 * me.warp + me.lane % 16,
                                                    8 * (n + me.lane / 16)),
                  words);
    }
    fence_async();
    meet(me);
    const bool whole = f.tma_out && (!f.p.sequences || i0 + 64 <= at.S) &&
                       !(flags[0] | flags[1] | flags[2] | flags[3]);
    if (whole) {
      if (me.thread == 0) {
#pragma unroll
        for (int c = 0; c < D; c += SLAB)
          tma_store(&f.out.map, base + L::OUT + at_heads<L::ROWS>(64 * me.group, c), c,
                    at.row0 + i0, at.head, at.batch);
        tma_commit();
        if (!L::OWN_OUT) tma_wait_read<0>();
      }
    } else if (careful) {
      for (int r = 0; r < 16 && mine + r < at.S; r++)
        careful_out(f.p, at.sequence, at.head, mine + r,
                    __shfl_sync(~0u, r < 8 ? rows.top[0] : rows.top[1], r % 8 * 4),
                    __shfl_sync(~0u, r < 8 ? rows.sum[0] : rows.sum[1], r % 8 * 4));
    } else {
      store_rows(me, at, [&](int r, int c) {
        const void* eight = shared + L::OUT + at_heads<L::ROWS>(r, c / 8 * 8);
        return static_cast<const uint16_t*>(eight)[c % 8];
      });
    }
    if (!L::OWN_OUT) {
      meet(me);
      if (me.lane == 0) mbarrier_arrive(base + L::Q_EMPTY);
    }
  }

  // The warp's rows of out by ordinary stores: value(row, column) of the tile.
  template <class Value>
  FASTTX_DEVICE void store_rows(const Me& me, const Place& at, Value value) {
    const fasttx_tensor& out = f.p.a.out;
    auto* to = static_cast<uint16_t*>(out.data) + rows_of(out, at.batch, at.head, at.row0);
    const int first = 64 * me.group + 16 * me.warp;
    for (int r = first; r < first + 16 && at.first + r < at.S; r++)
      for (int c = me.lane; c < f.p.Dv; c += 32)
        store(to + (at.first + r) * out.strides[2] + c * out.strides[3], value(r, c));
  }

  FASTTX_DEVICE void run() {
    const Key key = VARIANT == DROPPED ? load_key(f.p.dropout) : Key{0, 0};
    if (L::TURNS && threadIdx.x / 128 == 1) barrier_arrive(L::TURN, 256);
    Work work;
    for (int round = 0; round < f.rounds; round++)
      if (find_work<L, VARIANT>(f, work_of(round), work)) tile(round, work, key);
    if (threadIdx.x % 128 == 0) tma_wait_read<0>();
  }
};

template <class T, int D, Variant VARIANT>
__global__ void __launch_bounds__(Layout<D, VARIANT>::THREADS, 1)
    attention_fwd(const __grid_constant__ ForwardSm90 f) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<D, VARIANT>;
  FASTTX_SHARED(shared);
  const uint32_t base = shared_address(shared);
  if (threadIdx.x == 0) {
    mbarrier_init(base + L::Q_EMPTY, 4 * L::GROUPS);
    for (int i = 0; i < L::STAGES; i++) {
      mbarrier_init(base + L::K_FULL + 8 * i, 1);
      mbarrier_init(base + L::K_EMPTY + 8 * i, 4 * L::GROUPS);
      mbarrier_init(base + L::V_FULL + 8 * i, 1);
      mbarrier_init(base + L::V_EMPTY + 8 * i, 4 * L::GROUPS);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<L::GIVE>();
    if (threadIdx.x < 32) produce<D, VARIANT>(f, base);
  } else {
    registers_take<L::TAKE>();
    Consumer<T, D, VARIANT>(f, base, shared).run();
  }
#endif
}

template <class T, int D, Variant VARIANT>
int start_forward(const Attention& p, void* stream) {
  using L = Layout<D, VARIANT>;
  ForwardSm90 f = {};
  f.p = p;
  f.tiles = static_cast<int>(tile_count(p.S, p.sequences, L::ROWS));
  f.works = f.tiles * p.B * p.H;
  constexpr int64_t CACHE = 32 << 20;
  const int64_t heads = CACHE / (int64_t{p.T} * (p.D + p.Dv) * 2);
  f.section = static_cast<int>(min(max(heads, int64_t{1}) * p.group, int64_t{p.B} * p.H));
  f.hides = p.sequences || p.left != UNBOUNDED || p.right != UNBOUNDED || p.mask != NO_MASK;
  f.tma_out = !tma_refuses(p.a.out) && make_heads_map(&f.out, p.a.out, 64);
  if (!make_heads_map(&f.q, p.a.q, L::ROWS) || !make_heads_map(&f.k, p.a.k, L::KEYS) ||
      !make_heads_map(&f.v, p.a.v, L::KEYS))
    return cudaErrorInvalidValue;
  const int blocks = min(f.works, multiprocessors());
  f.rounds = (f.works + blocks - 1) / blocks;
  return launch(attention_fwd<T, D, VARIANT>, dim3(blocks), L::THREADS, L::BYTES, stream, f);
}

// All kernels of a dtype.
template <class T>
int start_forward(const Attention& p, void* stream) {
  const bool drops = p.dropout.threshold != 0, plain = is_plain(p);
  const auto choose = [&](auto size) {
    constexpr int D = decltype(size)::value;
    if (plain && !drops) return start_forward<T, D, PLAIN>(p, stream);
    if constexpr (D <= 128)
      if (!drops) return start_forward<T, D, BIASED>(p, stream);
    return start_forward<T, D, DROPPED>(p, stream);
  };
  const int D = max(p.D, p.Dv);
  return D <= 64    ? choose(std::integral_constant<int, 64>())
         : D <= 128 ? choose(std::integral_constant<int, 128>())
                    : choose(std::integral_constant<int, 256>());
}

}  // namespace fasttx
