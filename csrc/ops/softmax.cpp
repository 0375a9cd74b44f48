// softmax and log_softmax as torch ops on the stable ABI.
#include "ops/softmax.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, softmax_fwd, (const fasttx_softmax&))
FASTTX_BY_ISA(int, softmax_bwd, (const fasttx_softmax&))

namespace {

std::tuple<Tensor> softmax_fwd_outputs(const Tensor& x, const OptionalTensor&, double, bool, bool,
                                       bool, bool wide) {
  return {dense_like(x, wide ? ScalarType::Float : x.scalar_type())};
}

std::tuple<Tensor, Tensor> softmax_bwd_outputs(const Tensor&, const Tensor&, const Tensor& x,
                                               const OptionalTensor& mask, double, bool, bool, bool,
                                               int64_t need) {
  const Tensor nothing = empty({0}, x.scalar_type());
  return {need & 1 ? dense_like(x) : nothing,
          mask.has_value() && need & 2 ? empty_contiguous(*mask) : nothing};
}

void softmax_fwd_cpu(Tensor out, Tensor x, OptionalTensor mask, double scale, bool causal,
                     bool lower_right, bool log, bool) {
  const fasttx_softmax a = forward_arguments(out, x, mask, scale, causal, lower_right, log);
  check(BY_ISA(softmax_fwd)(a), "softmax_fwd");
}

void softmax_bwd_cpu(Tensor dx, Tensor dmask, Tensor dout, Tensor out, Tensor x, OptionalTensor,
                     double scale, bool causal, bool lower_right, bool log, int64_t need) {
  const fasttx_softmax a =
      backward_arguments(dx, dmask, dout, out, x, scale, causal, lower_right, log, need);
  check(BY_ISA(softmax_bwd)(a), "softmax_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("softmax_fwd_cpu" FASTTX_SOFTMAX_FWD_SCHEMA);
  m.def("softmax_bwd_cpu" FASTTX_SOFTMAX_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&softmax_fwd_cpu, &softmax_fwd_outputs>(m, "softmax_fwd_cpu");
  implement<&softmax_bwd_cpu, &softmax_bwd_outputs>(m, "softmax_bwd_cpu");
}
