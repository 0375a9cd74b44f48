// cross_entropy as torch ops on the stable ABI.
#include "ops/cross_entropy.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, cross_entropy_fwd, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_bwd, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_inplace, (const fasttx_cross_entropy&))
FASTTX_BY_ISA(int, cross_entropy_rescale, (const fasttx_cross_entropy&))

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd_outputs(
    const Tensor&, const Tensor& target, const OptionalTensor&, int64_t, int64_t reduction, double,
    double) {
  const int64_t rows = target.size(0);
  return {empty(&rows, reduction ? 0 : 1, ScalarType::Float), empty({rows}, ScalarType::Float),
          empty({rows}, ScalarType::Float), empty({2}, ScalarType::Float)};
}

std::tuple<Tensor> cross_entropy_bwd_outputs(const Tensor&, const Tensor& logits, const Tensor&,
                                             const OptionalTensor&, const Tensor&, const Tensor&,
                                             const Tensor&, int64_t, int64_t, double, double) {
  return {empty_contiguous(logits)};
}

std::tuple<Tensor, Tensor> cross_entropy_inplace_outputs(const Tensor&, const Tensor& target,
                                                         const OptionalTensor&, int64_t,
                                                         int64_t reduction, double, double) {
  const int64_t rows = target.size(0);
  return {empty(&rows, reduction ? 0 : 1, ScalarType::Float),
          empty(nullptr, 0, ScalarType::Float)};
}

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
  implement<&cross_entropy_fwd_cpu, &cross_entropy_fwd_outputs>(m, "cross_entropy_fwd_cpu");
  implement<&cross_entropy_bwd_cpu, &cross_entropy_bwd_outputs>(m, "cross_entropy_bwd_cpu");
  implement<&cross_entropy_inplace_cpu, &cross_entropy_inplace_outputs>(
      m, "cross_entropy_inplace_cpu");
  implement<&cross_entropy_rescale_cpu>(m, "cross_entropy_rescale_cpu");
}
