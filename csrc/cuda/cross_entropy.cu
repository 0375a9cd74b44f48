// cross_entropy: a block has a row and reads it once for the loss, once more for the gradient. What
// the rows give is added by one block, in order.
#include "cuda/cross_entropy_rows.h"

namespace fasttx {
namespace {

constexpr int SINGLE = 512;  // threads of the kernels that are one block

// norm and, where weights and smoothing ask for it, the sum of all weights.
__global__ void __launch_bounds__(SINGLE)
    cross_entropy_count(const __grid_constant__ CrossEntropy p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_cross_entropy& a = p.a;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  if (a.reduction == FASTTX_MEAN)
    for (int64_t m = threadIdx.x; m < p.rows; m += SINGLE) {
      const int64_t target = target_of(p, m);
      if (target == a.ignore_index) continue;
      sums[1] += 1.0f;
      if (!a.weight.data)
        sums[0] += 1.0f;
      else if (target >= 0 && target < p.V)
        sums[0] += weight_of(p, target);
    }
  if (p.weight_sum)
    for (int n = threadIdx.x; n < p.V; n += SINGLE) sums[2] += weight_of(p, n);
  block_sum(sums, scratch);
  if (threadIdx.x) return;
  const bool mean = a.reduction == FASTTX_MEAN;
  const float norm = mean ? 1.0f / sums[0] : 1.0f, norm_z = mean ? 1.0f / sums[1] : 1.0f;
  // The gradient in place of 16-bit means is multiplied by norm[0] when the upstream gradient is.
  p.norm[0] = p.later ? 1.0f : norm;
  p.norm[1] = p.later ? norm_z / norm : norm_z;
  if (a.factor.data) *static_cast<float*>(a.factor.data) = p.later ? norm : 1.0f;
  if (p.weight_sum) *p.weight_sum = sums[2];
}

__global__ void __launch_bounds__(512, 2)
    cross_entropy_rows(const __grid_constant__ CrossEntropy p) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const fasttx_cross_entropy& a = p.a;
  const int64_t m = blockIdx.x, target = target_of(p, m), stride = a.logits.strides[2];
  auto* row = static_cast<uint16_t*>(a.logits.data) + row_of(a.logits, p, m);
  const bool used = target != a.ignore_index;
  RowStatistics s = {0.0f, 0.0f, 0.0f};
  if (used) s = row_statistics(p, row, stride, target, scratch);
  if (threadIdx.x == 0) {
    const float lse = s.peak + s.log_sum;
    // In place the rows are gone afterwards: both terms are added here, in the parts of the mean.
    const float z = used ? static_cast<float>(a.z_loss) * lse * lse : 0.0f;
    const float norm = p.norm[0], norm_z = p.norm[1];
    const float loss = used ? s.term * norm + (a.z_loss != 0 ? z * norm_z : 0.0f) : 0.0f;
    if (a.reduction == FASTTX_NONE)
      store(static_cast<float*>(a.loss.data) + m, loss);
    else
      store(p.terms + m, loss);
    if (!p.in_place) {
      store(static_cast<float*>(a.peak.data) + m, s.peak);
      store(static_cast<float*>(a.log_sum.data) + m, s.log_sum);
    }
  }
  if (!p.in_place) return;
  // Every thread has read the target's logit.
  __syncthreads();
  if (used)
    row_gradient(p, row, stride, row, stride, target, s.peak, s.log_sum, p.norm[0], p.norm[1]);
  else
    row_zero(row, stride, p.V);
}

// loss = the sum of the rows' terms.
__global__ void __launch_bounds__(SINGLE)
    cross_entropy_finish(const __grid_constant__ CrossEntropy p) {
  FASTTX_SHARED(shared);
  float sums[2] = {0.0f, 0.0f};
  for (int64_t m = threadIdx.x; m < p.rows; m += SINGLE) {
    if (target_of(p, m) == p.a.ignore_index) continue;
    sums[0] += load(p.terms + m);
    sums[1] = 1.0f;
  }
  block_sum(sums, reinterpret_cast<float*>(shared));
  if (threadIdx.x) return;
  float loss = sums[0];
  if (p.later) loss *= *static_cast<const float*>(p.a.factor.data);
  if (p.a.reduction == FASTTX_MEAN && sums[1] == 0.0f) loss = NAN;
  *static_cast<float*>(p.a.loss.data) = loss;
}

__global__ void __launch_bounds__(512, 2)
    cross_entropy_bwd(const __grid_constant__ CrossEntropy p) {
  const fasttx_cross_entropy& a = p.a;
  const int64_t m = blockIdx.x, target = target_of(p, m), stride = a.dlogits.strides[2];
  auto* gradient = static_cast<uint16_t*>(a.dlogits.data) + row_of(a.dlogits, p, m);
  if (target == a.ignore_index) {
    row_zero(gradient, stride, p.V);
    return;
  }
  const auto* row = static_cast<const uint16_t*>(a.logits.data) + row_of(a.logits, p, m);
  const float up = load(static_cast<const float*>(a.dloss.data) +
                        (a.reduction == FASTTX_NONE ? m * a.dloss.strides[0] : 0));
  row_gradient(p, gradient, stride, row, a.logits.strides[2], target,
               load(static_cast<const float*>(a.peak.data) + m),
               load(static_cast<const float*>(a.log_sum.data) + m), up * p.norm[0], up * p.norm[1]);
}

// The gradient left in the logits, times dloss * factor.
__global__ void __launch_bounds__(512, 2)
    cross_entropy_rescale(const __grid_constant__ CrossEntropy p) {
  const fasttx_cross_entropy& a = p.a;
  const int64_t m = blockIdx.x, stride = a.logits.strides[2];
  if (target_of(p, m) == a.ignore_index) return;
  const bool each = a.dloss.sizes[0] == p.rows && p.rows > 1;
  const float by =
      *static_cast<const float*>(a.factor.data) *
      load(static_cast<const float*>(a.dloss.data) + (each ? m * a.dloss.strides[0] : 0));
  if (by == 1.0f) return;
  auto* row = static_cast<uint16_t*>(a.logits.data) + row_of(a.logits, p, m);
  sweep<4>(
      row, a.logits.dtype, stride, p.V, stride == 1,
      [&](int n, const float(&x)[8]) {
        float d[8];
#pragma unroll
        for (int i = 0; i < 8; i++) d[i] = x[i] * by;
        store16(row + n, pack8(d, a.logits.dtype));
      },
      [&](int n, float x) { store1(row, a.logits.dtype, n * stride, x * by); });
}

CrossEntropy arguments(const fasttx_cross_entropy& a, float* workspace) {
  CrossEntropy p = {a,
                    a.logits.sizes[0] * a.logits.sizes[1],
                    a.logits.sizes[1],
                    static_cast<int>(a.logits.sizes[2]),
                    static_cast<float*>(a.norm.data),
                    workspace,
                    nullptr,
                    0,
                    0};
  if (a.weight.data && a.label_smoothing != 0) p.weight_sum = workspace + p.rows;
  if (!p.norm) p.norm = workspace + p.rows + 1;
  return p;
}

int by_row(void (*kernel)(CrossEntropy), const CrossEntropy& p, void* stream) {
  if (p.rows == 0 || p.V == 0) return 0;
  const int threads = p.V <= 4096 ? 128 : 512;
  return launch(kernel, dim3(static_cast<unsigned>(p.rows)), threads, 96 * 4, stream, p);
}
int by_one(void (*kernel)(CrossEntropy), const CrossEntropy& p, void* stream) {
  return launch(kernel, dim3(1), SINGLE, 96 * 4, stream, p);
}

int forward(const CrossEntropy& p, void* stream) {
  int status = by_one(cross_entropy_count, p, stream);
  if (!status) status = by_row(cross_entropy_rows, p, stream);
  if (!status && p.a.reduction != FASTTX_NONE) status = by_one(cross_entropy_finish, p, stream);
  return status;
}

}  // namespace
}  // namespace fasttx

// Each a cudaError_t; workspace: B * S + 3 floats.
FASTTX_API int fasttx_cuda_cross_entropy_fwd(const fasttx_cross_entropy& a, float* workspace,
                                             void* stream) {
  return fasttx::forward(fasttx::arguments(a, workspace), stream);
}
FASTTX_API int fasttx_cuda_cross_entropy_inplace(const fasttx_cross_entropy& a, float* workspace,
                                                 void* stream) {
  fasttx::CrossEntropy p = fasttx::arguments(a, workspace);
  p.in_place = 1;
  p.later = a.logits.dtype == FASTTX_F16;
  return fasttx::forward(p, stream);
}
FASTTX_API int fasttx_cuda_cross_entropy_bwd(const fasttx_cross_entropy& a, float* workspace,
                                             void* stream) {
  using namespace fasttx;
  const CrossEntropy p = arguments(a, workspace);
  int status = 0;
  if (p.weight_sum) {
    // The norms are the forward's; only the weights are added again.
    CrossEntropy again = p;
    again.norm = workspace + p.rows + 1;
    again.a.reduction = FASTTX_NONE;
    status = by_one(cross_entropy_count, again, stream);
  }
  return status ? status : by_row(cross_entropy_bwd, p, stream);
}
FASTTX_API int fasttx_cuda_cross_entropy_rescale(const fasttx_cross_entropy& a, void* stream) {
  using namespace fasttx;
  return by_row(cross_entropy_rescale, arguments(a, nullptr), stream);
}
