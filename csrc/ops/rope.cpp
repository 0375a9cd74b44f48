// rope as torch ops on the stable ABI.
#include "cpu/rope.h"

#include "cpu/isa.h"
#include "ops.h"

FASTTX_BY_ISA(int, rope, (const fasttx_rope&))

namespace {

void rotate(const Tensor& q_out, const OptionalTensor& k_out, const Tensor& q,
            const OptionalTensor& k, const Tensor& cos, const Tensor& sin, int64_t rotary,
            bool interleaved, bool adjoint) {
  fasttx_rope a = {};
  a.q = view(q);
  a.k = view(k);
  a.q_out = view(q_out);
  a.k_out = view(k_out);
  a.cos = view(cos);
  a.sin = view(sin);
  a.rotary = rotary;
  a.interleaved = interleaved;
  a.adjoint = adjoint;
  check(BY_ISA(rope)(a), "rope");
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
  m.def(
      "rope_fwd_cpu(Tensor(a!) q_out, Tensor(b!) k_out, Tensor q, Tensor? k, Tensor cos, "
      "Tensor sin, int rotary, bool interleaved) -> ()");
  m.def(
      "rope_bwd_cpu(Tensor(a!) dq, Tensor(b!) dk, Tensor dq_out, Tensor? dk_out, Tensor cos, "
      "Tensor sin, int rotary, bool interleaved) -> ()");
  m.def(
      "rope_inplace_cpu(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, int rotary, "
      "bool interleaved) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  m.impl("rope_fwd_cpu", TORCH_BOX(&rope_fwd_cpu));
  m.impl("rope_bwd_cpu", TORCH_BOX(&rope_bwd_cpu));
  m.impl("rope_inplace_cpu", TORCH_BOX(&rope_inplace_cpu));
}
