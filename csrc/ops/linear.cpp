// linear as torch ops on the stable ABI.
#include "ops/linear.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, linear_fwd, (const fasttx_linear&))
FASTTX_BY_ISA(int, linear_bwd, (const fasttx_linear&))

namespace {

void linear_fwd_cpu(Tensor out, Tensor pre, Tensor x, Tensor weight, OptionalTensor bias,
                    OptionalTensor residual, int64_t activation, bool keep) {
  check(BY_ISA(linear_fwd)(
            forward_arguments(out, pre, x, weight, bias, residual, activation, keep)),
        "linear_fwd");
}

void linear_bwd_cpu(Tensor dx, Tensor dweight, Tensor dbias, Tensor x, Tensor weight,
                    OptionalTensor pre, Tensor dout, int64_t activation, int64_t need) {
  check(BY_ISA(linear_bwd)(
            backward_arguments(dx, dweight, dbias, x, weight, pre, dout, activation, need)),
        "linear_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("linear_fwd_cpu" FASTTX_LINEAR_FWD_SCHEMA);
  m.def("linear_bwd_cpu" FASTTX_LINEAR_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&linear_fwd_cpu>(m, "linear_fwd_cpu");
  implement<&linear_bwd_cpu>(m, "linear_bwd_cpu");
}
