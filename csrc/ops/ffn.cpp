// ffn as torch ops on the stable ABI.
#include "cpu/ffn.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, ffn_fwd, (const fasttx_ffn&))
FASTTX_BY_ISA(int, ffn_bwd, (const fasttx_ffn&))

namespace {

fasttx_ffn common(const Tensor& x, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                  const OptionalTensor& w_gate, const OptionalTensor& b_gate,
                  const OptionalTensor& seed, int64_t activation, double hidden_dropout_p,
                  double dropout_p) {
  fasttx_ffn a = {};
  a.x = view(x);
  a.w1 = view(w1);
  a.b1 = view(b1);
  a.w2 = view(w2);
  a.w_gate = view(w_gate);
  a.b_gate = view(b_gate);
  a.seed = seed.has_value() ? seed->data_ptr() : nullptr;
  a.activation = static_cast<int32_t>(activation);
  a.hidden_dropout_p = hidden_dropout_p;
  a.dropout_p = dropout_p;
  return a;
}

void ffn_fwd_cpu(Tensor out, Tensor pre, Tensor pre_gate, Tensor x, Tensor w1, OptionalTensor b1,
                 Tensor w2, OptionalTensor b2, OptionalTensor w_gate, OptionalTensor b_gate,
                 OptionalTensor seed, int64_t activation, double hidden_dropout_p,
                 double dropout_p, bool keep) {
  fasttx_ffn a =
      common(x, w1, b1, w2, w_gate, b_gate, seed, activation, hidden_dropout_p, dropout_p);
  a.out = view(out);
  a.pre = view(pre);
  a.pre_gate = view(pre_gate);
  a.b2 = view(b2);
  a.keep = keep;
  check(BY_ISA(ffn_fwd)(a), "ffn_fwd");
}

void ffn_bwd_cpu(Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dw_gate,
                 Tensor db_gate, Tensor x, OptionalTensor pre, OptionalTensor pre_gate,
                 Tensor dout, Tensor w1, OptionalTensor b1, Tensor w2, OptionalTensor w_gate,
                 OptionalTensor b_gate, OptionalTensor seed, int64_t activation,
                 double hidden_dropout_p, double dropout_p, int64_t need) {
  fasttx_ffn a =
      common(x, w1, b1, w2, w_gate, b_gate, seed, activation, hidden_dropout_p, dropout_p);
  a.pre = view(pre);
  a.pre_gate = view(pre_gate);
  a.dout = view(dout);
  a.dx = view(dx);
  a.dw1 = view(dw1);
  a.db1 = view(db1);
  a.dw2 = view(dw2);
  a.db2 = view(db2);
  a.dw_gate = view(dw_gate);
  a.db_gate = view(db_gate);
  a.need = static_cast<int32_t>(need);
  check(BY_ISA(ffn_bwd)(a), "ffn_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "ffn_fwd_cpu(Tensor(a!) out, Tensor(b!) pre, Tensor(c!) pre_gate, Tensor x, Tensor w1, "
      "Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, Tensor? b_gate, Tensor? seed, "
      "int activation, float hidden_dropout_p, float dropout_p, bool keep) -> ()");
  m.def(
      "ffn_bwd_cpu(Tensor(a!) dx, Tensor(b!) dw1, Tensor(c!) db1, Tensor(d!) dw2, Tensor(e!) db2, "
      "Tensor(f!) dw_gate, Tensor(g!) db_gate, Tensor x, Tensor? pre, Tensor? pre_gate, "
      "Tensor dout, Tensor w1, Tensor? b1, Tensor w2, Tensor? w_gate, Tensor? b_gate, "
      "Tensor? seed, int activation, float hidden_dropout_p, float dropout_p, int need) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&ffn_fwd_cpu>(m, "ffn_fwd_cpu");
  implement<&ffn_bwd_cpu>(m, "ffn_bwd_cpu");
}
