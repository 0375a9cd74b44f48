// The arguments of ffn's ops as those of its kernels, and the ops' schemas.
#pragma once
#include "cpu/ffn.h"
#include "ops.h"

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

fasttx_ffn forward_arguments(Tensor out, Tensor pre, Tensor pre_gate, Tensor x, Tensor w1,
                             OptionalTensor b1, Tensor w2, OptionalTensor b2, OptionalTensor w_gate,
                             OptionalTensor b_gate, OptionalTensor seed, int64_t activation,
                             double hidden_dropout_p, double dropout_p, bool keep) {
  fasttx_ffn a =
      common(x, w1, b1, w2, w_gate, b_gate, seed, activation, hidden_dropout_p, dropout_p);
  a.out = view(out);
  a.pre = view(pre);
  a.pre_gate = view(pre_gate);
  a.b2 = view(b2);
  a.keep = keep;
  return a;
}

fasttx_ffn backward_arguments(Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2,
                              Tensor dw_gate, Tensor db_gate, Tensor x, OptionalTensor pre,
                              OptionalTensor pre_gate, Tensor dout, Tensor w1, OptionalTensor b1,
                              Tensor w2, OptionalTensor w_gate, OptionalTensor b_gate,
                              OptionalTensor seed, int64_t activation, double hidden_dropout_p,
                              double dropout_p, int64_t need) {
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
  return a;
}

#define FASTTX_FFN_FWD_SCHEMA                                                                      \
  "(Tensor(a!) out, Tensor(b!) pre, Tensor(c!) pre_gate, Tensor x, Tensor w1, Tensor? b1, "        \
  "Tensor w2, Tensor? b2, Tensor? w_gate, Tensor? b_gate, Tensor? seed, int activation, "          \
  "float hidden_dropout_p, float dropout_p, bool keep) -> ()"
#define FASTTX_FFN_BWD_SCHEMA                                                                      \
  "(Tensor(a!) dx, Tensor(b!) dw1, Tensor(c!) db1, Tensor(d!) dw2, Tensor(e!) db2, "               \
  "Tensor(f!) dw_gate, Tensor(g!) db_gate, Tensor x, Tensor? pre, Tensor? pre_gate, Tensor dout, " \
  "Tensor w1, Tensor? b1, Tensor w2, Tensor? w_gate, Tensor? b_gate, Tensor? seed, "               \
  "int activation, float hidden_dropout_p, float dropout_p, int need) -> ()"

}  // namespace
