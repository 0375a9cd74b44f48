// linear_cross_entropy's kernel as a torch op on the stable ABI.
#include "cpu/linear_cross_entropy.h"

#include "cpu/isa.h"
#include "ops.h"

FASTTX_BY_ISA(int, linear_cross_entropy_slope, (const fasttx_logit_slope&))

namespace {

void linear_cross_entropy_slope_cpu(Tensor logits, Tensor target, OptionalTensor weight, Tensor peak,
                                    Tensor log_sum, Tensor scales, int64_t first) {
  const fasttx_logit_slope a = {view(logits),  view(target), view(weight), view(peak),
                                view(log_sum), view(scales), first};
  check(BY_ISA(linear_cross_entropy_slope)(a), "linear_cross_entropy_slope");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "linear_cross_entropy_slope_cpu(Tensor(a!) logits, Tensor target, Tensor? weight, "
      "Tensor peak, Tensor log_sum, Tensor scales, int first) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  m.impl("linear_cross_entropy_slope_cpu", TORCH_BOX(&linear_cross_entropy_slope_cpu));
}
