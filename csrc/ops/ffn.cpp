// ffn as torch ops on the stable ABI.
#include "ops/ffn.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, ffn_fwd, (const fasttx_ffn&))
FASTTX_BY_ISA(int, ffn_bwd, (const fasttx_ffn&))

namespace {

void ffn_fwd_cpu(Tensor out, Tensor pre, Tensor pre_gate, Tensor x, Tensor w1, OptionalTensor b1,
                 Tensor w2, OptionalTensor b2, OptionalTensor w_gate, OptionalTensor b_gate,
                 OptionalTensor seed, int64_t activation, double hidden_dropout_p, double dropout_p,
                 bool keep) {
  const fasttx_ffn a =
      forward_arguments(out, pre, pre_gate, x, w1, b1, w2, b2, w_gate, b_gate, seed, activation,
                        hidden_dropout_p, dropout_p, keep);
  check(BY_ISA(ffn_fwd)(a), "ffn_fwd");
}

void ffn_bwd_cpu(Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dw_gate,
                 Tensor db_gate, Tensor x, OptionalTensor pre, OptionalTensor pre_gate, Tensor dout,
                 Tensor w1, OptionalTensor b1, Tensor w2, OptionalTensor w_gate,
                 OptionalTensor b_gate, OptionalTensor seed, int64_t activation,
                 double hidden_dropout_p, double dropout_p, int64_t need) {
  const fasttx_ffn a =
      backward_arguments(dx, dw1, db1, dw2, db2, dw_gate, db_gate, x, pre, pre_gate, dout, w1, b1,
                         w2, w_gate, b_gate, seed, activation, hidden_dropout_p, dropout_p, need);
  check(BY_ISA(ffn_bwd)(a), "ffn_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("ffn_fwd_cpu" FASTTX_FFN_FWD_SCHEMA);
  m.def("ffn_bwd_cpu" FASTTX_FFN_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&ffn_fwd_cpu>(m, "ffn_fwd_cpu");
  implement<&ffn_bwd_cpu>(m, "ffn_bwd_cpu");
}
