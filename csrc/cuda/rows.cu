// Sums of parts.
#include "cuda/rows.h"

namespace fasttx {
namespace {

constexpr int THREADS = 256;

struct Sums {
  PartSums p;
  int64_t groups;  // of eight columns, in all
  int lanes;       // threads that share a group
};

__global__ void __launch_bounds__(THREADS) parts_sum(const __grid_constant__ Sums s) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);  // [8, THREADS]
  const PartSums& p = s.p;
  const PartSums::To& out = p.to[blockIdx.y];
  if (!out.data) return;
  const int each = THREADS / s.lanes, mine = threadIdx.x % each, lane = threadIdx.x / each;
  const int64_t group = int64_t{blockIdx.x} * each + mine, across = (p.columns + 7) / 8;
  const int64_t row = group / across, column = group % across * 8;
  const int live = group < s.groups ? static_cast<int>(min(p.columns - column, int64_t{8})) : 0;
  const float* from = p.partials + blockIdx.y * p.matrix + row * p.columns + column;
  const bool whole = live == 8 && p.columns % 4 == 0;
  float total[8] = {};
#pragma unroll 4
  for (int part = lane; part < p.parts; part += s.lanes) {
    const float* at = from + part * p.part;
    float v[8] = {};
    if (whole) {
      unpack8(load8(at, FASTTX_F32, 0), FASTTX_F32, v);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (i < live) v[i] = load(at + i);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) total[i] += v[i];
  }
  if (s.lanes > 1) {
#pragma unroll
    for (int i = 0; i < 8; i++) scratch[i * THREADS + threadIdx.x] = total[i];
    __syncthreads();
    if (lane) return;
    for (int other = 1; other < s.lanes; other++)
#pragma unroll
      for (int i = 0; i < 8; i++) total[i] += scratch[i * THREADS + other * each + mine];
  }
  const int64_t to = row * out.row + column * out.column;
  const bool by_eight =
      out.column == 1 && out.row % 8 == 0 && reinterpret_cast<uintptr_t>(out.data) % 16 == 0;
  if (live == 8 && by_eight) {
    store8(out.data, out.dtype, to, total);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < live) store1(out.data, out.dtype, to + i * out.column, total[i]);
}

}  // namespace

int add_parts(const PartSums& sums, void* stream) {
  const int64_t groups = sums.rows * ((sums.columns + 7) / 8);
  if (!groups) return cudaSuccess;
  const int lanes = sums.parts > 64 ? 16 : 1, each = THREADS / lanes;
  const dim3 grid(static_cast<unsigned>((groups + each - 1) / each),
                  sums.to[1].data || sums.to[2].data ? 3 : 1);
  return launch(parts_sum, grid, THREADS, lanes > 1 ? 8 * THREADS * sizeof(float) : 0, stream,
                Sums{sums, groups, lanes});
}

}  // namespace fasttx
