// Attention of the newest tokens to a cache, split over the keys. A block has 16 query rows, of the
// heads that share a key and value head, and a range of keys; its four warps take 16 keys in turn.
// Both products are mma.sync on what 16-byte loads bring: the order of the columns within a product
// is free, so keys need no transposition, and of values each lane joins two neighbouring rows.
#include "cuda/attention_decode.h"
#include "cuda/ptx/mma.h"

namespace fasttx {
namespace {

constexpr int WARPS = 4, ROWS = 16, KEYS = 16;

// Online softmax of a row, by the four lanes that share it.
struct Running {
  float peak, total;
};

// One row at a time by a warp, from what each row sees alone: no product of a probability of zero.
template <bool EVEN>
FASTTX_DEVICE Running careful_row(const Decode& p, const Query& q, int b, int g, int begin, int end,
                                  float (&acc)[8]) {
  const fasttx_decode& a = p.a;
  const int column = threadIdx.x % 32 * 8;
  const int64_t q_row =
      b * a.q.strides[0] + q.head * a.q.strides[1] + q.i * a.q.strides[2];
  float query[8], x[8];
  const int dtype = a.q.dtype;
  unpack8(load_columns<EVEN>(a.q, q_row, column, p.D), dtype, query);
  Running row = {-INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < 8; i++) acc[i] = 0.0f;
  for (int j = max(begin, q.low); j < min(end, q.high); j++) {
    const Slot slot = slot_of(p, b, j);
    if (slot.owner < 0) continue;
    unpack8(load_columns<EVEN>(a.k, slot_offset(a.k, slot, g), column, p.D), dtype, x);
    float product = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) product += query[i] * x[i];
    const float logit = logit_of(p, q, b, j, warp_sum(product));
    const float peak = fmaxf(row.peak, logit), shift = peak == -INFINITY ? 0.0f : peak;
    const float decay = row.peak == -INFINITY ? 1.0f : exp2_approx(row.peak - shift);
    const float weight = exp2_approx(logit - shift);
    row = {peak, row.total * decay + weight};
    unpack8(load_columns<EVEN>(a.v, slot_offset(a.v, slot, g), column, p.Dv), dtype, x);
#pragma unroll
    for (int i = 0; i < 8; i++) acc[i] = acc[i] * decay + weight * x[i];
  }
  return row;
}

template <int CHUNKS, bool EVEN>
__global__ void __launch_bounds__(32 * WARPS, CHUNKS == 1   ? 4
                                              : CHUNKS == 2 ? 3
                                                            : 2)
    attention_decode(const __grid_constant__ Decode p) {
  FASTTX_SHARED(shared);
  constexpr int COLUMNS = 64 * CHUNKS, STEPS = COLUMNS / 32;
  Words* queries = reinterpret_cast<Words*>(shared);  // operands of q, [2 * STEPS][32]
  float* sums = reinterpret_cast<float*>(shared);     // then: [ROWS][COLUMNS]
  float* statistics = sums + ROWS * COLUMNS;          // [WARPS][2][ROWS], then [2][ROWS]
  float* flags = statistics + 2 * WARPS * ROWS;       // [WARPS]
  Query* rows = reinterpret_cast<Query*>(flags + WARPS);  // [ROWS]
  const fasttx_decode& a = p.a;
  const int dtype = a.q.dtype;
  auto by_dtype = [&](auto products) {
    if (dtype == FASTTX_BF16)
      products(bf16());
    else
      products(f16());
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, part = lane % 4;
  int block = blockIdx.x;
  const int split = block % p.splits;
  block /= p.splits;
  const int first_row = block % p.tiles * ROWS;
  block /= p.tiles;
  const int g = block % p.G, b = block / p.G;
  const int length =
      clamp(load(static_cast<const int32_t*>(a.lengths.data) + b * a.lengths.strides[0]), 0, p.T);

  // The queries as the first operand: of a row's columns 32 s + 8 part .. + 7 the first four words
  // make step 2 s, the last step 2 s + 1.
  for (int item = threadIdx.x; item < ROWS * STEPS * 4; item += 32 * WARPS) {
    const int r = item / (STEPS * 4), s = item % (STEPS * 4) / 4, t = item % 4;
    Words words = {{0, 0, 0, 0}};
    if (first_row + r < p.group * p.S) {
      const int head = g * p.group + (first_row + r) / p.S, i = (first_row + r) % p.S;
      const int64_t from = b * a.q.strides[0] + head * a.q.strides[1] + i * a.q.strides[2];
      words = load_columns<EVEN>(a.q, from, 32 * s + 8 * t, p.D);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Words& to = queries[(2 * s + h) * 32 + r % 8 * 4 + t];
      to.w[r / 8] = words.w[2 * h];
      to.w[r / 8 + 2] = words.w[2 * h + 1];
    }
  }
  if (threadIdx.x < ROWS) rows[threadIdx.x] = query_of(p, b, g, first_row + threadIdx.x, length);
  __syncthreads();
  const int low[2] = {rows[row].low, rows[row + 8].low},
            high[2] = {rows[row].high, rows[row + 8].high};
  int first = min(low[0], low[1]), last = max(high[0], high[1]);
#pragma unroll
  for (int with = 4; with < 32; with *= 2) {
    first = min(first, __shfl_xor_sync(~0u, first, with));
    last = max(last, __shfl_xor_sync(~0u, last, with));
  }
  const int count = max(0, last - first), turn = WARPS * KEYS;
  const int each = ((count + p.splits - 1) / p.splits + turn - 1) / turn * turn;
  const int begin = first + min(split * each, count), end = first + min((split + 1) * each, count);

  float acc[CHUNKS][8][4] = {};
  Running running[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
  for (int j = begin + warp * KEYS; j < end; j += turn) {
    // A lane knows where one of the 16 keys lies.
    const int mine = j + lane % KEYS;
    const Slot own = mine < end ? slot_of(p, b, mine) : Slot{-1, 0};
    auto slot = [&](int key) {
      return Slot{__shfl_sync(~0u, own.owner, key), __shfl_sync(~0u, own.at, key)};
    };
    auto load_keys = [&](int n, Words(&k)[STEPS]) {
      const Slot at = slot(8 * n + row);
      const int64_t from = slot_offset(a.k, at, g);
#pragma unroll
      for (int s = 0; s < STEPS; s++)
        k[s] = at.owner < 0 ? Words{{0, 0, 0, 0}}
                            : load_columns<EVEN>(a.k, from, 32 * s + 8 * part, p.D);
    };
    // As many loads are under way at once as registers hold.
    constexpr int KEYS_AHEAD = CHUNKS > 2 ? 1 : 2, VALUES_AHEAD = CHUNKS > 2 ? 1 : CHUNKS;
    Words k[KEYS_AHEAD][STEPS], v[VALUES_AHEAD][4];
#pragma unroll
    for (int n = 0; n < KEYS_AHEAD; n++) load_keys(n, k[n]);
    Slot at[4];
#pragma unroll
    for (int n = 0; n < 4; n++) at[n] = slot(2 * part + n % 2 + 8 * (n / 2));
    auto load_values = [&](int c, Words(&v)[4]) {
#pragma unroll
      for (int n = 0; n < 4; n++)
        v[n] = at[n].owner < 0
                   ? Words{{0, 0, 0, 0}}
                   : load_columns<EVEN>(a.v, slot_offset(a.v, at[n], g), 64 * c + 8 * row, p.Dv);
    };
#pragma unroll
    for (int c = 0; c < VALUES_AHEAD; c++) load_values(c, v[c]);

    float score[2][4] = {};
#pragma unroll
    for (int first_n = 0; first_n < 2; first_n += KEYS_AHEAD) {
      if (first_n) load_keys(first_n, k[0]);
      by_dtype([&](auto type) {
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            if (32 * s >= p.D) continue;
            const Words words = queries[(2 * s + h) * 32 + lane];
            const uint32_t q[4] = {words.w[0], words.w[1], words.w[2], words.w[3]};
#pragma unroll
            for (int n = 0; n < KEYS_AHEAD; n++)
              mma<decltype(type)>(score[first_n + n], q, k[n][s].w[2 * h], k[n][s].w[2 * h + 1]);
          }
      });
    }

    float decay[2];
    bool raised = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float peak = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int key = 8 * n + 2 * part + e;
          const bool seen =
              at[2 * n + e].owner >= 0 && j + key >= low[r] && j + key < high[r];
          float& x = score[n][2 * r + e];
          x = seen ? logit_of(p, rows[row + 8 * r], b, j + key, x) : -INFINITY;
          peak = fmaxf(peak, x);
        }
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
      peak = fmaxf(peak, running[r].peak);
      const float shift = peak == -INFINITY ? 0.0f : peak;
      decay[r] = running[r].peak == -INFINITY ? 1.0f : exp2_approx(running[r].peak - shift);
      raised |= decay[r] != 1.0f;
      running[r] = {peak, running[r].total * decay[r]};
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = score[n][2 * r + e];
          x = exp2_approx(x - shift);
          running[r].total += x;
        }
    }
    if (__any_sync(~0u, raised)) {
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) acc[c][i][e] *= decay[e / 2];
    }
    // Column 8 row + i of a chunk is column `row` of product i.
    by_dtype([&](auto type) {
      using T = decltype(type);
      uint32_t weights[4];
#pragma unroll
      for (int w = 0; w < 4; w++)
        weights[w] = T::pack(score[w / 2][w % 2 * 2], score[w / 2][w % 2 * 2 + 1]);
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        if (64 * c >= p.Dv) continue;
        Words(&now)[4] = v[c < VALUES_AHEAD ? c : 0];
        if (c >= VALUES_AHEAD) load_values(c, now);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          uint32_t pair[2];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const uint32_t x = now[2 * h].w[i / 2], y = now[2 * h + 1].w[i / 2];
            pair[h] = i % 2 ? x >> 16 | (y & 0xffff0000u) : (x & 0xffffu) | y << 16;
          }
          mma<T>(acc[c][i], weights, pair[0], pair[1]);
        }
      }
    });
  }

  // Where queries see different keys, a product may have met NaN or infinity behind a zero.
  bool bad = false;
  if (p.S > 1) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) bad |= !(fabsf(acc[c][i][e]) < INFINITY);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    running[r].total += __shfl_xor_sync(~0u, running[r].total, 1);
    running[r].total += __shfl_xor_sync(~0u, running[r].total, 2);
    if (part == 0) {
      statistics[(2 * warp) * ROWS + row + 8 * r] = running[r].peak;
      statistics[(2 * warp + 1) * ROWS + row + 8 * r] = running[r].total;
    }
  }
  bad = __any_sync(~0u, bad);
  if (lane == 0) flags[warp] = bad ? 1.0f : 0.0f;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; w++) bad |= flags[w] != 0.0f;

  if (!bad) {
    // The warps' sums, added in order.
    Running all[2];
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      all[r] = {-INFINITY, 0.0f};
      for (int w = 0; w < WARPS; w++)
        all[r].peak = fmaxf(all[r].peak, statistics[2 * w * ROWS + row + 8 * r]);
      const float shift = all[r].peak == -INFINITY ? 0.0f : all[r].peak;
      for (int w = 0; w < WARPS; w++)
        all[r].total += exp2_approx(statistics[2 * w * ROWS + row + 8 * r] - shift) *
                        statistics[(2 * w + 1) * ROWS + row + 8 * r];
      factor[r] = running[r].peak == -INFINITY ? 1.0f : exp2_approx(running[r].peak - shift);
    }
    for (int w = 0; w < WARPS; w++) {
      if (w == warp) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
          for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int column = 64 * c + 16 * part + 8 * (e % 2) + i;
              float& to = sums[(row + 8 * (e / 2)) * COLUMNS + column];
              const float x = acc[c][i][e] * factor[e / 2];
              to = w ? to + x : x;
            }
      }
      __syncthreads();
    }
    if (warp == 0 && part == 0) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        statistics[row + 8 * r] = all[r].peak;
        statistics[ROWS + row + 8 * r] = all[r].total;
      }
    }
  } else {
    for (int r = warp; r < ROWS; r += WARPS) {
      float x[8];
      const Running found = careful_row<EVEN>(p, rows[r], b, g, begin, end, x);
      if (lane * 8 < COLUMNS) {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[r * COLUMNS + lane * 8 + i] = x[i];
      }
      if (lane == 0) {
        statistics[r] = found.peak;
        statistics[ROWS + r] = found.total;
      }
    }
  }
  __syncthreads();

  for (int item = threadIdx.x; item < ROWS * (COLUMNS / 8); item += 32 * WARPS) {
    const int r = item / (COLUMNS / 8), d = item % (COLUMNS / 8) * 8;
    if (first_row + r >= p.group * p.S || d >= p.Dv) continue;
    const int head = g * p.group + (first_row + r) / p.S, i = (first_row + r) % p.S;
    const float peak = statistics[r], total = statistics[ROWS + r];
    float x[8];
    const float by = p.splits > 1 ? 1.0f : total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = by == 0.0f ? 0.0f : sums[r * COLUMNS + d + k] * by;
    if (p.splits > 1) {
      const int64_t to = ((int64_t{b} * p.H + head) * p.S + i) * p.splits + split;
      if (begin < end) store8(p.parts + to * p.width, FASTTX_F32, d, x);
      if (d == 0) {
        store(p.peaks + to, peak);
        store(p.totals + to, total);
      }
      continue;
    }
    const int64_t to = b * a.out.strides[0] + head * a.out.strides[1] + i * a.out.strides[2];
    if (EVEN) {
      store16(static_cast<uint16_t*>(a.out.data) + to + d, pack8(x, dtype));
    } else {
#pragma unroll
      for (int k = 0; k < 8; k++)
        if (d + k < p.Dv) store1(a.out.data, dtype, to + (d + k) * a.out.strides[3], x[k]);
    }
  }
}

// One row by a warp: its splits added up in their order.
__global__ void __launch_bounds__(32 * WARPS)
    attention_decode_combine(const __grid_constant__ Decode p) {
  const fasttx_decode& a = p.a;
  const int lane = threadIdx.x % 32, d = lane * 8;
  const int64_t row = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
  if (row >= a.q.sizes[0] * p.H * p.S) return;
  const float *peaks = p.peaks + row * p.splits, *totals = p.totals + row * p.splits;
  float peak = -INFINITY;
  for (int s = lane; s < p.splits; s += 32) peak = fmaxf(peak, load(peaks + s));
  peak = warp_max(peak);
  if (peak == -INFINITY) peak = 0.0f;
  float acc[8] = {}, sum = 0.0f;
  constexpr int IN_FLIGHT = 4;
  for (int s = 0; s < p.splits; s += IN_FLIGHT) {
    Bits8 bits[IN_FLIGHT];
    float weight[IN_FLIGHT], total[IN_FLIGHT];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      total[k] = s + k < p.splits ? load(totals + s + k) : 0.0f;
      if (total[k] == 0.0f) continue;  // nothing seen, nothing written
      weight[k] = exp2_approx(load(peaks + s + k) - peak);
      if (d < p.width) bits[k] = load8(p.parts, FASTTX_F32, (row * p.splits + s + k) * p.width + d);
    }
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      if (total[k] == 0.0f) continue;
      sum += weight[k] * total[k];
      if (d >= p.width) continue;
      float x[8];
      unpack8(bits[k], FASTTX_F32, x);
#pragma unroll
      for (int i = 0; i < 8; i++) acc[i] += weight[k] * x[i];
    }
  }
  if (d >= p.Dv) return;
  const float by = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int i = 0; i < 8; i++) acc[i] *= by;
  const int64_t b = row / (int64_t{p.H} * p.S), head = row / p.S % p.H;
  const int64_t to = b * a.out.strides[0] + head * a.out.strides[1] + row % p.S * a.out.strides[2];
  auto* out = static_cast<uint16_t*>(a.out.data) + to;
  if (p.width == p.Dv && a.out.strides[3] == 1 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    store16(out + d, pack8(acc, a.out.dtype));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (d + i < p.Dv) store1(out, a.out.dtype, (d + i) * a.out.strides[3], acc[i]);
  }
}

// The relative bias by distance, in units of log2(e).
__global__ void __launch_bounds__(256)
    attention_decode_diagonals(const __grid_constant__ Decode p) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, count = 2 * p.reach + 1, head = blockIdx.y;
  if (x >= count) return;
  const fasttx_tensor &table = p.a.table, &lut = p.a.lut;
  const int bucket = load(static_cast<const int32_t*>(lut.data) + x * lut.strides[0]);
  const int64_t from = bucket * table.strides[0] + head * table.strides[1];
  store(p.diagonals + int64_t{head} * count + x, LOG2E * load1(table.data, table.dtype, from));
}

Decode arguments(const fasttx_decode& a) {
  Decode p = {};
  p.a = a;
  p.H = static_cast<int>(a.q.sizes[1]);
  p.G = static_cast<int>(a.k.sizes[1]);
  p.S = static_cast<int>(a.q.sizes[2]);
  p.D = static_cast<int>(a.q.sizes[3]);
  p.Dv = static_cast<int>(a.v.sizes[3]);
  p.group = p.G ? p.H / p.G : 0;
  p.pages = static_cast<int>(a.k.sizes[0]);
  p.page = a.block_table.data ? static_cast<int>(a.k.sizes[2]) : 0;
  p.T = static_cast<int>(p.page ? a.block_table.sizes[1] * p.page : a.k.sizes[2]);
  if (a.block_table.data && !p.page) p.T = 0;
  p.tiles = (p.group * p.S + ROWS - 1) / ROWS;
  p.left = static_cast<int>(min(a.left, int64_t{p.T}));
  p.right = static_cast<int>(min(a.right, int64_t{p.T}));
  const double unit = a.softcap > 0 ? 1.0 / a.softcap : 1.4426950408889634;
  p.scale = static_cast<float>(a.scale * unit);
  p.cap = static_cast<float>(a.softcap * 1.4426950408889634);
  p.reach = a.table.data ? static_cast<int>(a.lut.sizes[0] / 2) : 0;
  p.width = (p.Dv + 7) / 8 * 8;
  // Three blocks on every multiprocessor, each with two turns of its warps at least.
  const int64_t blocks = max(int64_t{1}, a.q.sizes[0] * p.G * p.tiles);
  const int64_t wanted = (3 * int64_t{multiprocessors()} + blocks - 1) / blocks;
  p.splits = static_cast<int>(
      max(int64_t{1}, min(min(wanted, int64_t{128}), int64_t{p.T} / (2 * WARPS * KEYS))));
  return p;
}
int64_t rows_of(const Decode& p) { return p.a.q.sizes[0] * p.H * p.S; }

template <int CHUNKS, bool EVEN>
int attend(const Decode& p, void* stream) {
  const size_t shared =
      (ROWS * 64 * CHUNKS + 2 * WARPS * ROWS + WARPS) * sizeof(float) + ROWS * sizeof(Query);
  const int64_t blocks = p.a.q.sizes[0] * p.G * p.tiles * p.splits;
  return launch(attention_decode<CHUNKS, EVEN>, dim3(static_cast<unsigned>(blocks)), 32 * WARPS,
                shared, stream, p);
}

int forward(const Decode& p, void* stream) {
  bool even = p.D % 8 == 0 && p.Dv % 8 == 0;
  for (const fasttx_tensor* t : {&p.a.q, &p.a.k, &p.a.v, &p.a.out}) even &= by_eight(*t, 3);
  const int widest = max(p.D, p.Dv);
  int status = !even           ? attend<4, false>(p, stream)
               : widest <= 64  ? attend<1, true>(p, stream)
               : widest <= 128 ? attend<2, true>(p, stream)
                               : attend<4, true>(p, stream);
  if (!status && p.splits > 1)
    status = launch(attention_decode_combine,
                    dim3(static_cast<unsigned>((rows_of(p) + WARPS - 1) / WARPS)), 32 * WARPS, 0,
                    stream, p);
  return status;
}

}  // namespace
}  // namespace fasttx

FASTTX_API int64_t fasttx_cuda_attention_decode_workspace(const fasttx_decode& a) {
  using namespace fasttx;
  const Decode p = arguments(a);
  return (p.splits > 1 ? rows_of(p) * p.splits * (p.width + 2) : 0) +
         (a.table.data ? int64_t{p.H} * (2 * p.reach + 1) : 0);
}

// A cudaError_t.
FASTTX_API int fasttx_cuda_attention_decode(const fasttx_decode& a, float* workspace,
                                            void* stream) {
  using namespace fasttx;
  Decode p = arguments(a);
  if (!rows_of(p) || !p.Dv) return 0;
  if (p.splits > 1) {
    p.parts = workspace;
    p.peaks = p.parts + rows_of(p) * p.splits * p.width;
    p.totals = p.peaks + rows_of(p) * p.splits;
    workspace = p.totals + rows_of(p) * p.splits;
  }
  int status = 0;
  if (a.table.data) {
    p.diagonals = workspace;
    status = launch(attention_decode_diagonals,
                    dim3(static_cast<unsigned>((2 * p.reach + 256) / 256), p.H), 256, 0, stream, p);
  }
  if (status) return status;
  return forward(p, stream);
}
