// linear_cross_entropy's kernels as torch ops on the stable ABI.
#include "cpu/linear_cross_entropy.h"

#include "cpu/isa.h"
#include "ops.h"

FASTTX_BY_ISA(int, linear_cross_entropy_slope, (const fasttx_logit_slope&))
FASTTX_BY_ISA(int, linear_cross_entropy_statistics, (const fasttx_class_walk&))
FASTTX_BY_ISA(int, linear_cross_entropy_gradients, (const fasttx_class_walk&))

namespace {

void linear_cross_entropy_slope_cpu(Tensor logits, Tensor target, OptionalTensor weight, Tensor peak,
                                    Tensor log_sum, Tensor scales, int64_t first) {
  const fasttx_logit_slope a = {view(logits),  view(target), view(weight), view(peak),
                                view(log_sum), view(scales), first};
  check(BY_ISA(linear_cross_entropy_slope)(a), "linear_cross_entropy_slope");
}

fasttx_class_walk class_walk(Tensor x, Tensor weight, OptionalTensor bias, Tensor target,
                             OptionalTensor class_weight, Tensor kept, Tensor peak, Tensor log_sum,
                             Tensor at_target) {
  fasttx_class_walk a = {};
  a.x = view(x);
  a.weight = view(weight);
  a.bias = view(bias);
  a.target = view(target);
  a.class_weight = view(class_weight);
  a.kept = view(kept);
  a.peak = view(peak);
  a.log_sum = view(log_sum);
  a.at_target = view(at_target);
  return a;
}

void linear_cross_entropy_statistics_cpu(Tensor x, Tensor weight, OptionalTensor bias, Tensor target,
                                         OptionalTensor class_weight, Tensor kept, Tensor peak,
                                         Tensor log_sum, Tensor at_target, OptionalTensor weighted) {
  fasttx_class_walk a =
      class_walk(x, weight, bias, target, class_weight, kept, peak, log_sum, at_target);
  a.weighted = view(weighted);
  check(BY_ISA(linear_cross_entropy_statistics)(a), "linear_cross_entropy_statistics");
}

void linear_cross_entropy_gradients_cpu(Tensor x, Tensor weight, OptionalTensor bias, Tensor target,
                                        OptionalTensor class_weight, Tensor kept, Tensor peak,
                                        Tensor log_sum, Tensor at_target, Tensor scales, Tensor dx,
                                        Tensor dweight, Tensor dbias, int64_t need) {
  fasttx_class_walk a =
      class_walk(x, weight, bias, target, class_weight, kept, peak, log_sum, at_target);
  a.scales = view(scales);
  a.dx = view(dx);
  a.dweight = view(dweight);
  a.dbias = view(dbias);
  a.need = (int32_t)need;
  check(BY_ISA(linear_cross_entropy_gradients)(a), "linear_cross_entropy_gradients");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "linear_cross_entropy_slope_cpu(Tensor(a!) logits, Tensor target, Tensor? weight, "
      "Tensor peak, Tensor log_sum, Tensor scales, int first) -> ()");
  m.def(
      "linear_cross_entropy_statistics_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor target, "
      "Tensor? class_weight, Tensor(a!) kept, Tensor(b!) peak, Tensor(c!) log_sum, "
      "Tensor(d!) at_target, Tensor(e!)? weighted) -> ()");
  m.def(
      "linear_cross_entropy_gradients_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor target, "
      "Tensor? class_weight, Tensor kept, Tensor peak, Tensor log_sum, Tensor at_target, "
      "Tensor scales, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, int need) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  m.impl("linear_cross_entropy_slope_cpu", TORCH_BOX(&linear_cross_entropy_slope_cpu));
  m.impl("linear_cross_entropy_statistics_cpu", TORCH_BOX(&linear_cross_entropy_statistics_cpu));
  m.impl("linear_cross_entropy_gradients_cpu", TORCH_BOX(&linear_cross_entropy_gradients_cpu));
}
