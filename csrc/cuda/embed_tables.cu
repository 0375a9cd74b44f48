// The gradients of embed's tables: rows of dz summed by id, without atomics, in an order that the
// ids alone give. Ids are sorted, stably; a warp sums 32 of them, run by run, for 256 columns. A
// run that goes on in the next 32 is summed by one warp more, from the sums of its pieces.
#include "cuda/embed.h"

namespace fasttx {
namespace {

constexpr int CHUNK = 32, WARPS = 4, IN_FLIGHT = 4;

struct Table {
  fasttx_embed a;
  int table;
  fasttx_rows dz, to;
  int32_t* keys;   // [M]: ids, rows where there is no gradient; sorted but by their own kernel
  int64_t* order;  // [M]: rows of dz
  float* partials;  // [chunks, 2, N]: of a chunk's first run, where it began before; of its last
  float scale;
  int even;  // eight columns lie in aligned 16 bytes, of dz and of the gradient
};

FASTTX_DEVICE void load_columns(const Table& p, int64_t row, int64_t n, Bits8& bits) {
  const int64_t at = row_offset(p.dz, row) + n * p.dz.column;
  if (p.even) {
    bits = load8(p.dz.data, p.dz.dtype, at);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    bits.w[i / 4].w[i % 4] =
        n + i < p.a.N ? __float_as_uint(load1(p.dz.data, p.dz.dtype, at + i * p.dz.column)) : 0;
}
FASTTX_DEVICE void add_columns(const Table& p, const Bits8& bits, float (&total)[8]) {
  float v[8];
  unpack8(bits, p.even ? p.dz.dtype : FASTTX_F32, v);
#pragma unroll
  for (int i = 0; i < 8; i++) total[i] += v[i];
}
FASTTX_DEVICE void store_columns(const Table& p, int64_t row, int64_t n, const float (&v)[8]) {
  float scaled[8];
#pragma unroll
  for (int i = 0; i < 8; i++) scaled[i] = v[i] * p.scale;
  const int64_t at = row * p.a.N + n;
  if (p.even) {
    store8(p.to.data, p.to.dtype, at, scaled);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (n + i < p.a.N) store1(p.to.data, p.to.dtype, at + i, scaled[i]);
}
// A partial sum lies in rows of N rounded up to eight.
FASTTX_DEVICE float* partial(const Table& p, int64_t chunk, int which, int64_t n) {
  return p.partials + (chunk * 2 + which) * ((p.a.N + 7) / 8 * 8) + n;
}

// The ids of a table, padding and what is out of range made equal.
__global__ void __launch_bounds__(256) embed_keys(const __grid_constant__ Table p) {
  const int64_t m = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (m >= p.a.M) return;
  const int64_t id = id_of(p.a, p.table, m), rows = p.a.rows[p.table];
  const bool none = id < 0 || id >= rows || id == p.a.padding[p.table];
  store(p.keys + m, static_cast<int32_t>(none ? rows : id));
  if (p.order) store(p.order + m, m);
}

FASTTX_DEVICE int32_t key_at(const Table& p, int64_t i) {
  return i >= 0 && i < p.a.M ? load(p.keys + i) : -1;
}

__global__ void __launch_bounds__(32 * WARPS) embed_runs(const __grid_constant__ Table p) {
  const int lane = threadIdx.x % 32;
  const int64_t chunk = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32, first = chunk * CHUNK;
  if (first >= p.a.M) return;
  const int64_t n = (int64_t{blockIdx.y} * 32 + lane) * 8;
  const bool live = n < p.a.N;
  const int32_t key = key_at(p, first + lane), before = key_at(p, first - 1),
                after = key_at(p, first + CHUNK);
  const int64_t row = first + lane < p.a.M ? load(p.order + first + lane) : 0;
  const int count = static_cast<int>(min(int64_t{CHUNK}, p.a.M - first));
  bool opened = before == __shfl_sync(~0u, key, 0);
  float total[8] = {};
  for (int e = 0; e < count; e += IN_FLIGHT) {
    Bits8 bits[IN_FLIGHT];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      const int64_t from = __shfl_sync(~0u, row, e + k);
      const int32_t id = __shfl_sync(~0u, key, e + k);
      if (live && e + k < count && id < p.a.rows[p.table]) load_columns(p, from, n, bits[k]);
    }
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      const int32_t id = __shfl_sync(~0u, key, e + k);
      const int32_t next = __shfl_sync(~0u, key, e + k + 1 < CHUNK ? e + k + 1 : 0);
      const bool last = e + k + 1 == CHUNK;
      if (e + k >= count || id >= p.a.rows[p.table]) continue;
      if (live) add_columns(p, bits[k], total);
      const bool goes_on = (last ? after : e + k + 1 < count ? next : -1) == id;
      if (goes_on && !last) continue;
      if (live) {
        if (opened)
          store8(partial(p, chunk, 0, n), FASTTX_F32, 0, total);
        else if (goes_on)
          store8(partial(p, chunk, 1, n), FASTTX_F32, 0, total);
        else
          store_columns(p, id, n, total);
      }
      opened = false;
#pragma unroll
      for (int i = 0; i < 8; i++) total[i] = 0.0f;
    }
  }
}

// The first of the sorted ids that is not below.
FASTTX_DEVICE int64_t lower_bound(const Table& p, int64_t id) {
  int64_t low = 0, high = p.a.M;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load(p.keys + middle) < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The run that begins in a chunk and goes on after it.
__global__ void __launch_bounds__(32 * WARPS) embed_join(const __grid_constant__ Table p) {
  const int lane = threadIdx.x % 32;
  const int64_t chunk = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32, first = chunk * CHUNK;
  if (first + CHUNK >= p.a.M) return;
  const int64_t n = (int64_t{blockIdx.y} * 32 + lane) * 8;
  const int32_t id = key_at(p, first + CHUNK - 1);
  if (n >= p.a.N || id >= p.a.rows[p.table] || key_at(p, first + CHUNK) != id) return;
  if (key_at(p, first - 1) == id) return;  // it began before
  const int64_t end = (lower_bound(p, int64_t{id} + 1) + CHUNK - 1) / CHUNK;
  float total[8] = {}, v[8];
  unpack8(load8(partial(p, chunk, 1, n), FASTTX_F32, 0), FASTTX_F32, total);
  for (int64_t at = chunk + 1; at < end; at += IN_FLIGHT) {
    Bits8 bits[IN_FLIGHT];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++)
      if (at + k < end) bits[k] = load8(partial(p, at + k, 0, n), FASTTX_F32, 0);
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
      if (at + k >= end) continue;
      unpack8(bits[k], FASTTX_F32, v);
#pragma unroll
      for (int i = 0; i < 8; i++) total[i] += v[i];
    }
  }
  store_columns(p, id, n, total);
}

// Rows that no id names: a lane looks for one each, the warp writes those that are not there.
__global__ void __launch_bounds__(32 * WARPS) embed_absent(const __grid_constant__ Table p) {
  const int lane = threadIdx.x % 32;
  const int64_t rows = p.a.rows[p.table];
  const int64_t first = (int64_t{blockIdx.x} * WARPS + threadIdx.x / 32) * 32;
  if (first >= rows) return;
  bool absent = first + lane < rows;
  if (absent) {
    const int64_t at = lower_bound(p, first + lane);
    absent = key_at(p, at) != first + lane;
  }
  uint32_t left = __ballot_sync(~0u, absent);
  const float nothing[8] = {};
  for (int r = 0; left >> r && r < 32; r++) {
    if (!(left >> r & 1)) continue;
    for (int64_t n = lane * 8; n < p.a.N; n += 256) store_columns(p, first + r, n, nothing);
  }
}

// Positions start + s of every sequence: their rows lie S apart in dz.
__global__ void __launch_bounds__(32 * WARPS) embed_positions(const __grid_constant__ Table p) {
  const fasttx_embed& a = p.a;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
  const int64_t n = (int64_t{blockIdx.y} * 32 + lane) * 8;
  if (row >= a.rows[p.table] || n >= a.N) return;
  float total[8] = {};
  const int64_t s = row - a.start;
  if (s >= 0 && s < a.S && row != a.padding[p.table])
    for (int64_t m = s; m < a.M; m += IN_FLIGHT * a.S) {
      Bits8 bits[IN_FLIGHT];
#pragma unroll
      for (int k = 0; k < IN_FLIGHT; k++)
        if (m + k * a.S < a.M) load_columns(p, m + k * a.S, n, bits[k]);
#pragma unroll
      for (int k = 0; k < IN_FLIGHT; k++)
        if (m + k * a.S < a.M) add_columns(p, bits[k], total);
    }
  store_columns(p, row, n, total);
}

Table make_table(const fasttx_embed& a, int table, const fasttx_rows& dz) {
  Table p = {a, table, dz, a.dtable[table], nullptr, nullptr, nullptr, 1.0f, 0};
  if (table == FASTTX_TOKEN) p.scale = static_cast<float>(a.scale);
  p.even = a.N % 8 == 0 && by_eight(dz) && by_eight(p.to);
  return p;
}
unsigned warps_of(int64_t items) { return static_cast<unsigned>((items + WARPS - 1) / WARPS); }

}  // namespace
}  // namespace fasttx

// Each a cudaError_t. dz is what fasttx_cuda_embed_bwd_rows says.
FASTTX_API int fasttx_cuda_embed_positions(const fasttx_embed& a, const fasttx_rows& dz,
                                           void* stream) {
  using namespace fasttx;
  const Table p = make_table(a, FASTTX_POSITION, dz);
  if (!a.N || !a.rows[FASTTX_POSITION]) return 0;
  const dim3 grid(warps_of(a.rows[FASTTX_POSITION]), static_cast<unsigned>((a.N + 255) / 256));
  return launch(embed_positions, grid, 32 * WARPS, 0, stream, p);
}

// keys: what to sort; order, where it is given: 0 .. M - 1, of keys that are sorted as they are.
FASTTX_API int fasttx_cuda_embed_keys(const fasttx_embed& a, int table, int32_t* keys,
                                      int64_t* order, void* stream) {
  using namespace fasttx;
  Table p = make_table(a, table, {});
  p.keys = keys;
  p.order = order;
  if (!a.M) return 0;
  return launch(embed_keys, dim3(static_cast<unsigned>((a.M + 255) / 256)), 256, 0, stream, p);
}

FASTTX_API int64_t fasttx_cuda_embed_table_workspace(const fasttx_embed& a) {
  return (a.M + fasttx::CHUNK - 1) / fasttx::CHUNK * 2 * ((a.N + 7) / 8 * 8);
}

FASTTX_API int fasttx_cuda_embed_table(const fasttx_embed& a, int table, const fasttx_rows& dz,
                                       int32_t* keys, int64_t* order, float* workspace,
                                       void* stream) {
  using namespace fasttx;
  Table p = make_table(a, table, dz);
  p.keys = keys;
  p.order = order;
  p.partials = workspace;
  if (!a.N || !a.rows[table]) return 0;
  const int64_t chunks = (a.M + CHUNK - 1) / CHUNK;
  const dim3 grid(warps_of(chunks), static_cast<unsigned>((a.N + 255) / 256));
  int status = launch(embed_absent, dim3(warps_of((a.rows[table] + 31) / 32)), 32 * WARPS, 0,
                      stream, p);
  if (!status && a.M) status = launch(embed_runs, grid, 32 * WARPS, 0, stream, p);
  if (!status && chunks > 1) status = launch(embed_join, grid, 32 * WARPS, 0, stream, p);
  return status;
}
