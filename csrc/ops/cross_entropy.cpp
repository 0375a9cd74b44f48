// cross_entropy as torch ops on the stable ABI.
#include "cpu/cross_entropy.h"

#include "cpu/isa.h"
#include "ops.h"

FASTTX_BY_ISA(int, cross_entropy_fwd, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_bwd, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_inplace, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_rescale, (const fasttx_cross_entropy&))

namespace {

fasttx_cross_entropy common(const Tensor& logits, const Tensor& target,
                            const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
                            double label_smoothing, double z_loss) {
  fasttx_cross_entropy a = {};
  a.logits = view(logits);
  a.target = view(target);
  a.weight = view(weight);
  a.ignore_index = ignore_index;
  a.reduction = static_cast<int32_t>(reduction);
  a.label_smoothing = label_smoothing;
  a.z_loss = z_loss;
  return a;
}

void cross_entropy_fwd_cpu(Tensor loss, Tensor peak, Tensor log_sum, Tensor norm, Tensor logits,
                           Tensor target, OptionalTensor weight, int64_t ignore_index,
                           int64_t reduction, double label_smoothing, double z_loss) {
  fasttx_cross_entropy a =
      common(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss);
  a.loss = view(loss);
  a.peak = view(peak);
  a.log_sum = view(log_sum);
  a.norm = view(norm);
  check(BY_ISA(cross_entropy_fwd)(a), "cross_entropy_fwd");
}

void cross_entropy_bwd_cpu(Tensor dlogits, Tensor dloss, Tensor logits, Tensor target,
                           OptionalTensor weight, Tensor peak, Tensor log_sum, Tensor norm,
                           int64_t ignore_index, int64_t reduction, double label_smoothing,
                           double z_loss) {
  fasttx_cross_entropy a =
      common(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss);
  a.dlogits = view(dlogits);
  a.dloss = view(dloss);
  a.peak = view(peak);
  a.log_sum = view(log_sum);
  a.norm = view(norm);
  check(BY_ISA(cross_entropy_bwd)(a), "cross_entropy_bwd");
}

void cross_entropy_inplace_cpu(Tensor loss, Tensor factor, Tensor logits, Tensor target,
                               OptionalTensor weight, int64_t ignore_index, int64_t reduction,
                               double label_smoothing, double z_loss) {
  fasttx_cross_entropy a =
      common(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss);
  a.dlogits = a.logits;
  a.loss = view(loss);
  a.factor = view(factor);
  check(BY_ISA(cross_entropy_inplace)(a), "cross_entropy_inplace");
}

void cross_entropy_rescale_cpu(Tensor grad, Tensor dloss, Tensor factor, Tensor target,
                               int64_t ignore_index) {
  fasttx_cross_entropy a = common(grad, target, OptionalTensor(), ignore_index, 0, 0, 0);
  a.dlogits = a.logits;
  a.dloss = view(dloss);
  a.factor = view(factor);
  check(BY_ISA(cross_entropy_rescale)(a), "cross_entropy_rescale");
}

#define FASTTX_CROSS_ENTROPY_SCALARS \
  "int ignore_index, int reduction, float label_smoothing, float z_loss"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "cross_entropy_fwd_cpu(Tensor(a!) loss, Tensor(b!) peak, Tensor(c!) log_sum, Tensor(d!) norm, "
      "Tensor logits, Tensor target, Tensor? weight, " FASTTX_CROSS_ENTROPY_SCALARS ") -> ()");
  m.def(
      "cross_entropy_bwd_cpu(Tensor(a!) dlogits, Tensor dloss, Tensor logits, Tensor target, "
      "Tensor? weight, Tensor peak, Tensor log_sum, Tensor norm, "
      FASTTX_CROSS_ENTROPY_SCALARS ") -> ()");
  m.def(
      "cross_entropy_inplace_cpu(Tensor(a!) loss, Tensor(b!) factor, Tensor(c!) logits, "
      "Tensor target, Tensor? weight, " FASTTX_CROSS_ENTROPY_SCALARS ") -> ()");
  m.def(
      "cross_entropy_rescale_cpu(Tensor(a!) grad, Tensor dloss, Tensor factor, Tensor target, "
      "int ignore_index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  m.impl("cross_entropy_fwd_cpu", TORCH_BOX(&cross_entropy_fwd_cpu));
  m.impl("cross_entropy_bwd_cpu", TORCH_BOX(&cross_entropy_bwd_cpu));
  m.impl("cross_entropy_inplace_cpu", TORCH_BOX(&cross_entropy_inplace_cpu));
  m.impl("cross_entropy_rescale_cpu", TORCH_BOX(&cross_entropy_rescale_cpu));
}
