// The gradient of a block of logits, some rows by some classes, in the logits' place.
#include "cpu/linear_cross_entropy.h"

#include "cpu/cross_entropy_row.h"
#include "cpu/parallel.h"

namespace fasttx::FASTTX_ISA {
namespace {

template <class T>
int slope(const fasttx_logit_slope& a) {
  const int64_t rows = a.logits.sizes[0], C = a.logits.sizes[1];
  const float* scales = (const float*)a.scales.data;
  const float* weight = (const float*)a.weight.data;
  const int64_t together = max64(1, 16384 / max64(1, C));
  parallel_items((rows + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
    const int64_t end = min64(rows, (item + 1) * together);
    for (int64_t m = item * together; m < end; m++) {
      T* x = (T*)a.logits.data + m * a.logits.strides[0];
      const int64_t target = ((const int64_t*)a.target.data)[m] - a.first;
      const Row row = {((const float*)a.peak.data)[m], ((const float*)a.log_sum.data)[m], 0};
      const Slope g = {scales[m], scales[rows + m], scales[2 * rows + m]};
      if (weight && g.fall != 0)
        row_gradient<T, WEIGHTED>(x, x, weight + a.first, C, target, row, g);
      else
        row_gradient<T, UNIFORM>(x, x, nullptr, C, target, row, g);
    }
  });
  return FASTTX_OK;
}

}  // namespace

int linear_cross_entropy_slope(const fasttx_logit_slope& a) {
  switch (a.logits.dtype) {
    case FASTTX_F32:
      return slope<float>(a);
    case FASTTX_BF16:
      return slope<bf16>(a);
    case FASTTX_F16:
      return slope<f16>(a);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
