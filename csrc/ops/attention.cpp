// attention as torch ops on the stable ABI.
#include "ops/attention.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, attention_fwd, (const fasttx_attention&))
FASTTX_BY_ISA(int, attention_bwd, (const fasttx_attention&))

namespace {

std::tuple<Tensor, Tensor> attention_fwd_outputs(Tensor q, Tensor, Tensor v,
                                                 FASTTX_ATTENTION_INPUTS) {
  return {empty_heads(q, v.size(3)), empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float)};
}

void attention_fwd_cpu(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                       FASTTX_ATTENTION_INPUTS) {
  check(BY_ISA(attention_fwd)(forward_arguments(out, lse, q, k, v, FASTTX_ATTENTION_ARGUMENTS)),
        "attention_fwd");
}

auto attention_bwd_outputs(const Tensor&, const OptionalTensor&, const Tensor& q, const Tensor& k,
                           const Tensor& v, const Tensor&, const Tensor&, FASTTX_ATTENTION_INPUTS,
                           int64_t need) {
  const Tensor nothing = empty({0}, q.scalar_type());
  auto like = [&](const Tensor& t, int64_t bit) { return need & bit ? dense_like(t) : nothing; };
  return std::tuple_cat(std::tuple{like(q, 1), like(k, 2), like(v, 4)},
                        empty_gradients(q, need >> 3, mask, table));
}

void attention_bwd_cpu(Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dtable, Tensor dout,
                       OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                       FASTTX_ATTENTION_INPUTS, int64_t need) {
  const fasttx_attention a = backward_arguments(dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out,
                                                lse, FASTTX_ATTENTION_ARGUMENTS, need);
  check(BY_ISA(attention_bwd)(a), "attention_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("attention_fwd_cpu" FASTTX_ATTENTION_FWD_SCHEMA);
  m.def("attention_bwd_cpu" FASTTX_ATTENTION_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&attention_fwd_cpu, &attention_fwd_outputs>(m, "attention_fwd_cpu");
  implement<&attention_bwd_cpu, &attention_bwd_outputs>(m, "attention_bwd_cpu");
}
