// linear as torch ops on the stable ABI.
#include "cpu/linear.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, linear_fwd, (const fasttx_linear&))
FASTTX_BY_ISA(int, linear_bwd, (const fasttx_linear&))

namespace {

void linear_fwd_cpu(Tensor out, Tensor pre, Tensor x, Tensor weight, OptionalTensor bias,
                    OptionalTensor residual, int64_t activation, bool keep) {
  fasttx_linear a = {};
  a.out = view(out);
  a.pre = view(pre);
  a.x = view(x);
  a.weight = view(weight);
  a.bias = view(bias);
  a.residual = view(residual);
  a.activation = static_cast<int32_t>(activation);
  a.keep = keep;
  check(BY_ISA(linear_fwd)(a), "linear_fwd");
}

void linear_bwd_cpu(Tensor dx, Tensor dweight, Tensor dbias, Tensor x, Tensor weight,
                    OptionalTensor pre, Tensor dout, int64_t activation, int64_t need) {
  fasttx_linear a = {};
  a.dx = view(dx);
  a.dweight = view(dweight);
  a.dbias = view(dbias);
  a.x = view(x);
  a.weight = view(weight);
  a.pre = view(pre);
  a.dout = view(dout);
  a.activation = static_cast<int32_t>(activation);
  a.need = static_cast<int32_t>(need);
  check(BY_ISA(linear_bwd)(a), "linear_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "linear_fwd_cpu(Tensor(a!) out, Tensor(b!) pre, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? residual, int activation, bool keep) -> ()");
  m.def(
      "linear_bwd_cpu(Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, Tensor x, "
      "Tensor weight, Tensor? pre, Tensor dout, int activation, int need) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&linear_fwd_cpu>(m, "linear_fwd_cpu");
  implement<&linear_bwd_cpu>(m, "linear_bwd_cpu");
}
