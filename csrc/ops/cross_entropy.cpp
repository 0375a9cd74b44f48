// cross_entropy as torch ops on the stable ABI.
#include "ops/cross_entropy.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, cross_entropy_fwd, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_bwd, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_inplace, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_rescale, (const fasttx_cross_entropy&))

namespace {

void cross_entropy_fwd_cpu(Tensor loss, Tensor peak, Tensor log_sum, Tensor norm, Tensor logits,
                           Tensor target, OptionalTensor weight, int64_t ignore_index,
                           int64_t reduction, double label_smoothing, double z_loss) {
  const fasttx_cross_entropy a = fwd_arguments(loss, peak, log_sum, norm, logits, target, weight,
                                               ignore_index, reduction, label_smoothing, z_loss);
  check(BY_ISA(cross_entropy_fwd)(a), "cross_entropy_fwd");
}

void cross_entropy_bwd_cpu(Tensor dlogits, Tensor dloss, Tensor logits, Tensor target,
                           OptionalTensor weight, Tensor peak, Tensor log_sum, Tensor norm,
                           int64_t ignore_index, int64_t reduction, double label_smoothing,
                           double z_loss) {
  const fasttx_cross_entropy a =
      bwd_arguments(dlogits, dloss, logits, target, weight, peak, log_sum, norm, ignore_index,
                    reduction, label_smoothing, z_loss);
  check(BY_ISA(cross_entropy_bwd)(a), "cross_entropy_bwd");
}

void cross_entropy_inplace_cpu(Tensor loss, Tensor factor, Tensor logits, Tensor target,
                               OptionalTensor weight, int64_t ignore_index, int64_t reduction,
                               double label_smoothing, double z_loss) {
  const fasttx_cross_entropy a = inplace_arguments(
      loss, factor, logits, target, weight, ignore_index, reduction, label_smoothing, z_loss);
  check(BY_ISA(cross_entropy_inplace)(a), "cross_entropy_inplace");
}

void cross_entropy_rescale_cpu(Tensor grad, Tensor dloss, Tensor factor, Tensor target,
                               int64_t ignore_index) {
  const fasttx_cross_entropy a = rescale_arguments(grad, dloss, factor, target, ignore_index);
  check(BY_ISA(cross_entropy_rescale)(a), "cross_entropy_rescale");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("cross_entropy_fwd_cpu" FASTTX_CROSS_ENTROPY_FWD_SCHEMA);
  m.def("cross_entropy_bwd_cpu" FASTTX_CROSS_ENTROPY_BWD_SCHEMA);
  m.def("cross_entropy_inplace_cpu" FASTTX_CROSS_ENTROPY_INPLACE_SCHEMA);
  m.def("cross_entropy_rescale_cpu" FASTTX_CROSS_ENTROPY_RESCALE_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&cross_entropy_fwd_cpu>(m, "cross_entropy_fwd_cpu");
  implement<&cross_entropy_bwd_cpu>(m, "cross_entropy_bwd_cpu");
  m.impl("cross_entropy_inplace_cpu", TORCH_BOX(&cross_entropy_inplace_cpu));
  m.impl("cross_entropy_rescale_cpu", TORCH_BOX(&cross_entropy_rescale_cpu));
}
