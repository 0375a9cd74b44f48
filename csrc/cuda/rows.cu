// Sums over rows in parts.
#include "cuda/rows.h"

namespace fasttx {
namespace {

// 32 columns of one vector, 8 parts at once.
__global__ void __launch_bounds__(256) add_parts_kernel(const __grid_constant__ PartSums p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_rows& to = p.to[blockIdx.y];
  if (!to.data) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = int64_t{blockIdx.x} * 32 + lane;
  float sum = 0.0f;
  if (n < p.N)
    for (int part = warp; part < p.parts; part += 8)
      sum += p.partials[(int64_t{part} * 3 + blockIdx.y) * p.N + n];
  scratch[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp || n >= p.N) return;
  sum = 0.0f;
  for (int w = 0; w < 8; w++) sum += scratch[w * 32 + lane];
  store1(to.data, to.dtype, n * to.column, sum);
}

}  // namespace

int add_parts(const PartSums& sums, void* stream) {
  const dim3 grid(static_cast<unsigned>((sums.N + 31) / 32), 3);
  return launch(add_parts_kernel, grid, 256, 8 * 32 * 4, stream, sums);
}

}  // namespace fasttx
