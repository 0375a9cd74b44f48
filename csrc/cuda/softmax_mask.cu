// The gradient of softmax's mask where rows share it.
#include "cuda/softmax_mask.h"

namespace fasttx {
namespace {

constexpr int WARPS = 8;

struct MaskGradient {
  Softmax s;
  MaskPlan plan;
  float* partials;
  int even;  // eight columns lie in aligned 16 bytes
};

FASTTX_DEVICE RowIndex row_at(const MaskPlan& plan, int64_t unit, int64_t shared) {
  const RowIndex own = row_index(unit, plan.kept[1], plan.kept[2]);
  const RowIndex other = row_index(shared, plan.shares[1], plan.shares[2]);
  return {{own.i[0] + other.i[0], own.i[1] + other.i[1], own.i[2] + other.i[2]}};
}
FASTTX_DEVICE int64_t row_number(const Softmax& p, const RowIndex& at) {
  return (at.i[0] * p.a.x.sizes[1] + at.i[1]) * p.a.x.sizes[2] + at.i[2];
}

// A part of the rows that share row `unit` of the mask, for 256 columns; a warp has every eighth of
// the rows.
__global__ void __launch_bounds__(32 * WARPS)
    softmax_mask_part(const __grid_constant__ MaskGradient g) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_softmax& a = g.s.a;
  const MaskPlan& plan = g.plan;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t blocks = (plan.columns + 255) / 256;
  const int64_t n = (blockIdx.x % blocks * 32 + lane) * 8;
  const int64_t slot = blockIdx.x / blocks, unit = slot / plan.parts, part = slot % plan.parts;
  const int64_t end = min((part + 1) * plan.part_rows, plan.shared);
  float sums[8] = {};
  if (n < plan.columns)
    for (int64_t q = part * plan.part_rows + warp; q < end; q += WARPS) {
      const RowIndex at = row_at(plan, unit, q);
      const int64_t y_at = row_of(a.out, at) + n * a.out.strides[3];
      const int64_t dy_at = row_of(a.dout, at) + n * a.dout.strides[3];
      const float sum = load(g.s.sums + row_number(g.s, at));
      float u[8] = {}, v[8] = {};
      if (g.even) {
        const Bits8 y = load8(a.out.data, a.out.dtype, y_at);
        const Bits8 dy = load8(a.dout.data, a.dout.dtype, dy_at);
        unpack8(y, a.out.dtype, u);
        unpack8(dy, a.dout.dtype, v);
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          if (n + i >= plan.columns) continue;
          u[i] = load1(a.out.data, a.out.dtype, y_at + i * a.out.strides[3]);
          v[i] = load1(a.dout.data, a.dout.dtype, dy_at + i * a.dout.strides[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; i++) sums[i] += gradient(u[i], v[i], sum, a.log);
    }
#pragma unroll
  for (int i = 0; i < 8; i++) scratch[(warp * 8 + i) * 32 + lane] = sums[i];
  __syncthreads();
  if (warp || n >= plan.columns) return;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (n + i >= plan.columns) return;
    float sum = 0.0f;
    for (int w = 0; w < WARPS; w++) sum += scratch[(w * 8 + i) * 32 + lane];
    store(g.partials + slot * plan.columns + n + i, sum);
  }
}

// A part of the rows that share a number of the mask.
__global__ void __launch_bounds__(256) softmax_mask_totals(const __grid_constant__ MaskGradient g) {
  FASTTX_SHARED(shared);
  const MaskPlan& plan = g.plan;
  const int64_t unit = blockIdx.x / plan.parts, part = blockIdx.x % plan.parts;
  const int64_t end = min((part + 1) * plan.part_rows, plan.shared);
  float sum[1] = {0.0f};
  for (int64_t q = part * plan.part_rows + threadIdx.x; q < end; q += blockDim.x)
    sum[0] += load(g.s.totals + row_number(g.s, row_at(plan, unit, q)));
  block_sum(sum, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) store(g.partials + blockIdx.x, sum[0]);
}

// The parts added in order, a number of the mask a thread.
__global__ void __launch_bounds__(256) softmax_mask_finish(const __grid_constant__ MaskGradient g) {
  const MaskPlan& plan = g.plan;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= plan.units * plan.columns) return;
  const int64_t unit = i / plan.columns, n = i % plan.columns;
  float sum = 0.0f;
  for (int64_t part = 0; part < plan.parts; part++)
    sum += load(g.partials + (unit * plan.parts + part) * plan.columns + n);
  const fasttx_tensor& to = g.s.a.dmask;
  const RowIndex at = row_index(unit, plan.kept[1], plan.kept[2]);
  store1(to.data, to.dtype, row_of(to, at) + n * to.strides[3], sum);
}

}  // namespace

MaskPlan mask_plan(const fasttx_softmax& a) {
  MaskPlan plan = {};
  plan.units = plan.shared = 1;
  for (int d = 0; d < 3; d++) {
    plan.kept[d] = a.dmask.sizes[d];
    plan.shares[d] = a.dmask.sizes[d] == a.x.sizes[d] ? 1 : a.x.sizes[d];
    plan.units *= plan.kept[d];
    plan.shared *= plan.shares[d];
  }
  plan.columns = a.dmask.sizes[3];
  if (!a.x.sizes[3]) plan.shared = 0;
  plan.direct = plan.shared == 1 && plan.columns == a.x.sizes[3];
  // Enough parts to fill the device, each of eight rows at least.
  const int64_t blocks = max(int64_t{1}, plan.units * ((plan.columns + 255) / 256));
  const int64_t most = (int64_t{multiprocessors()} * 4 + blocks - 1) / blocks;
  const int64_t parts = max(int64_t{1}, min(most, (plan.shared + WARPS - 1) / WARPS));
  plan.part_rows = max(int64_t{1}, (plan.shared + parts - 1) / parts);
  plan.parts = max(int64_t{1}, (plan.shared + plan.part_rows - 1) / plan.part_rows);
  return plan;
}

int softmax_mask_gradient(const Softmax& p, const MaskPlan& plan, float* partials, void* stream) {
  const int64_t numbers = plan.units * plan.columns;
  if (!numbers) return 0;
  const bool even =
      plan.columns % 8 == 0 && columns_by_eight(p.a.out) && columns_by_eight(p.a.dout);
  const MaskGradient g = {p, plan, partials, even};
  const int64_t slots = plan.units * plan.parts;
  int status;
  if (plan.columns == 1) {
    status = launch(softmax_mask_totals, dim3(static_cast<unsigned>(slots)), 256, 128, stream, g);
  } else {
    const int64_t blocks = (plan.columns + 255) / 256;
    status = launch(softmax_mask_part, dim3(static_cast<unsigned>(slots * blocks)), 32 * WARPS,
                    WARPS * 8 * 32 * 4, stream, g);
  }
  if (!status)
    status = launch(softmax_mask_finish, dim3(static_cast<unsigned>((numbers + 255) / 256)), 256, 0,
                    stream, g);
  return status;
}

}  // namespace fasttx
