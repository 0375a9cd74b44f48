// rope as torch ops on the stable ABI.
#include "ops/rope.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, rope, (const fasttx_rope&))

namespace {

void rotate(const Tensor& q_out, const OptionalTensor& k_out, const Tensor& q,
            const OptionalTensor& k, const Tensor& cos, const Tensor& sin, int64_t rotary,
            bool interleaved, bool adjoint) {
  const fasttx_rope a = rope_arguments(q_out, k_out, q, k, cos, sin, rotary, interleaved, adjoint);
  check(BY_ISA(rope)(a), "rope");
}

std::tuple<Tensor, Tensor> rope_outputs(const Tensor& q, const OptionalTensor& k, const Tensor&,
                                        const Tensor&, int64_t, bool) {
  return {dense_like(q), k.has_value() ? dense_like(*k) : empty({0}, q.scalar_type())};
}

void rope_fwd_cpu(Tensor q_out, Tensor k_out, Tensor q, OptionalTensor k, Tensor cos, Tensor sin,
                  int64_t rotary, bool interleaved) {
  rotate(q_out, k_out, q, k, cos, sin, rotary, interleaved, false);
}

void rope_bwd_cpu(Tensor dq, Tensor dk, Tensor dq_out, OptionalTensor dk_out, Tensor cos,
                  Tensor sin, int64_t rotary, bool interleaved) {
  rotate(dq, dk, dq_out, dk_out, cos, sin, rotary, interleaved, true);
}

void rope_inplace_cpu(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, int64_t rotary,
                      bool interleaved) {
  rotate(q, k, q, k, cos, sin, rotary, interleaved, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("rope_fwd_cpu" FASTTX_ROPE_FWD_SCHEMA);
  m.def("rope_bwd_cpu" FASTTX_ROPE_BWD_SCHEMA);
  m.def("rope_inplace_cpu" FASTTX_ROPE_INPLACE_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&rope_fwd_cpu, &rope_outputs>(m, "rope_fwd_cpu");
  implement<&rope_bwd_cpu, &rope_outputs>(m, "rope_bwd_cpu");
  implement<&rope_inplace_cpu>(m, "rope_inplace_cpu");
}
