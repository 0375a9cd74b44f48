// The norm of one row in fp32, forward and backward, and sums over rows in a fixed order.
#pragma once
#include <string.h>

#include "cpu/add_norm_row.h"

namespace fasttx::FASTTX_ISA {
namespace {

struct Moments {
  float mean, rstd;
};

// Of a row z with the given sum; mean is 0 for rms.
FASTTX_INLINE Moments row_moments(const float* z, float sum, int64_t N, bool rms, float eps) {
  const float center = rms ? 0.0f : sum / (float)N;
  const vf mean = set1(center);
  const float square = sum_over(N, [&](int64_t n) {
    const vf d = load(z + n) - mean;
    return d * d;
  });
  return {center, 1.0f / __builtin_sqrtf(square / (float)N + eps)};
}

// dweight += g xhat and dbias += g, with xhat = (z - mean) rstd left in z; where `rows`, d = rstd (g w
// - mean(g w) - xhat mean(g w xhat)), without the first mean for rms. All padded to whole vectors,
// g with zeros.
FASTTX_INLINE void norm_gradient(const float* weight, Moments row, bool rms, int64_t N, bool rows,
                                 const float* g, float* z, float* d, float* dweight, float* dbias) {
  const vf mean = set1(row.mean), rstd = set1(row.rstd);
  vf along[2] = {}, across[2] = {};
  // d holds g w first: rounded once, so that g w and its mean cancel where they are equal.
  auto add = [&](int64_t n, int i) {
    const vf upstream = load(g + n), x = (load(z + n) - mean) * rstd;
    const vf gw = upstream * load(weight + n);
    store(z + n, x);
    store(d + n, gw);
    store(dweight + n, fma(upstream, x, load(dweight + n)));
    store(dbias + n, load(dbias + n) + upstream);
    along[i] += gw;
    across[i] = fma(gw, x, across[i]);
  };
  int64_t n = 0;
  for (; n + 2 * W <= N; n += 2 * W) add(n, 0), add(n + W, 1);
  for (; n < N; n += W) add(n, 0);
  if (!rows) return;
  const vf c1 = set1(rms ? 0.0f : sum_lanes(along[0] + along[1]) / (float)N);
  const vf c2 = set1(sum_lanes(across[0] + across[1]) / (float)N);
  for (n = 0; n < N; n += W) store(d + n, (load(d + n) - fma(load(z + n), c2, c1)) * rstd);
}

// f(m, sums, memory) for every row m < M adds the row to sums [floats]; `memory` is the thread's own,
// of `bytes`. The rows are cut into parts, a function of the shape alone; each part sums groups of
// GROUP rows, then the groups, and the parts are added in order. Returns the sums, in SCRATCH_PACK, or
// null without memory.
template <class F>
const float* sum_rows(int64_t M, int64_t floats, size_t bytes, const F& f) {
  constexpr int GROUP = 8;  // rows summed before the part's own sums are touched
  constexpr int64_t MAX_PARTS = 64, MAX_PART_FLOATS = 1 << 22;
  const int64_t most = max64(1, min64(MAX_PARTS, MAX_PART_FLOATS / max64(1, floats)));
  const int64_t part_rows = M > GROUP ? round_up((M + most - 1) / most, GROUP) : max64(1, M);
  const int64_t parts = max64(1, (M + part_rows - 1) / part_rows);
  float* partials = (float*)scratch(SCRATCH_PACK, parts * floats * sizeof(float) + 64);
  if (!partials) return nullptr;
  int status = FASTTX_OK;
  parallel_items(parts, num_workers(), [&](int64_t, int64_t index) {
    float* group = (float*)scratch(SCRATCH_TILE, floats * sizeof(float) + bytes);
    if (!group) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    float* total = partials + index * floats;
    memset(total, 0, floats * sizeof(float));
    const int64_t begin = index * part_rows, end = min64(M, begin + part_rows);
    for (int64_t first = begin; first < end; first += GROUP) {
      memset(group, 0, floats * sizeof(float));
      for (int64_t m = first; m < min64(end, first + GROUP); m++) f(m, group, group + floats);
      for (int64_t n = 0; n < floats; n += W) store(total + n, load(total + n) + load(group + n));
    }
  });
  if (status != FASTTX_OK) return nullptr;
  for (int64_t i = 1; i < parts; i++)
    for (int64_t n = 0; n < floats; n += W)
      store(partials + n, load(partials + n) + load(partials + i * floats + n));
  return partials;
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
