// attention as torch ops on the stable ABI.
#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, attention_fwd, (const fasttx_attention&))
FASTTX_BY_ISA(int, attention_bwd, (const fasttx_attention&))

namespace {

// clang-format off
#define FASTTX_ATTENTION_INPUTS                                                                   \
  OptionalTensor mask, OptionalTensor slopes, OptionalTensor positions, OptionalTensor table,     \
  OptionalTensor lut, OptionalTensor cu_q, OptionalTensor cu_k, OptionalTensor seed, double scale, \
  double softcap, double dropout_p, int64_t left, int64_t right, bool lower_right, int64_t bias_shift
// clang-format on

fasttx_attention common(const Tensor& q, const Tensor& k, const Tensor& v,
                        FASTTX_ATTENTION_INPUTS) {
  fasttx_attention a = {};
  a.q = view(q);
  a.k = view(k);
  a.v = view(v);
  a.mask = view(mask);
  a.slopes = view(slopes);
  a.positions = view(positions);
  a.table = view(table);
  a.lut = view(lut);
  a.cu_q = view(cu_q);
  a.cu_k = view(cu_k);
  a.seed = view(seed);
  a.scale = scale;
  a.softcap = softcap;
  a.dropout_p = dropout_p;
  a.left = left;
  a.right = right;
  a.lower_right = lower_right;
  a.bias_shift = bias_shift;
  return a;
}
#define FASTTX_ATTENTION_ARGUMENTS                                                              \
  mask, slopes, positions, table, lut, cu_q, cu_k, seed, scale, softcap, dropout_p, left, right, \
      lower_right, bias_shift

std::tuple<Tensor, Tensor> attention_fwd_outputs(Tensor q, Tensor, Tensor v,
                                                 FASTTX_ATTENTION_INPUTS) {
  return {empty_heads(q, v.size(3)), empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float)};
}

void attention_fwd_cpu(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                       FASTTX_ATTENTION_INPUTS) {
  fasttx_attention a = common(q, k, v, FASTTX_ATTENTION_ARGUMENTS);
  a.out = view(out);
  a.lse = view(lse);
  check(BY_ISA(attention_fwd)(a), "attention_fwd");
}

void attention_bwd_cpu(Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dtable, Tensor dout,
                       OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                       FASTTX_ATTENTION_INPUTS, int64_t need) {
  fasttx_attention a = common(q, k, v, FASTTX_ATTENTION_ARGUMENTS);
  a.out = view(out);
  a.lse = view(lse);
  a.dq = view(dq);
  a.dk = view(dk);
  a.dv = view(dv);
  a.dmask = view(dmask);
  a.dtable = view(dtable);
  a.dout = view(dout);
  a.dlse = view(dlse);
  a.need = static_cast<int32_t>(need);
  check(BY_ISA(attention_bwd)(a), "attention_bwd");
}

#define FASTTX_SCHEMA_INPUTS                                                                    \
  "Tensor? mask, Tensor? slopes, Tensor? positions, Tensor? table, Tensor? lut, Tensor? cu_q, " \
  "Tensor? cu_k, Tensor? seed, float scale, float softcap, float dropout_p, int left, "         \
  "int right, bool lower_right, int bias_shift"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "attention_fwd_cpu(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, "
      FASTTX_SCHEMA_INPUTS ") -> ()");
  m.def(
      "attention_bwd_cpu(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dmask, "
      "Tensor(e!) dtable, Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, " FASTTX_SCHEMA_INPUTS ", int need) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&attention_fwd_cpu, &attention_fwd_outputs>(m, "attention_fwd_cpu");
  implement<&attention_bwd_cpu>(m, "attention_bwd_cpu");
}
