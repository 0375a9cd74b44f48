// The arguments of rope's ops as those of its kernels, and the ops' schemas.
#pragma once
#include "cpu/rope.h"
#include "ops.h"

namespace {

fasttx_rope rope_arguments(const Tensor& q_out, const OptionalTensor& k_out, const Tensor& q,
                           const OptionalTensor& k, const Tensor& cos, const Tensor& sin,
                           int64_t rotary, bool interleaved, bool adjoint) {
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
  return a;
}

#define FASTTX_ROPE_FWD_SCHEMA                                                         \
  "(Tensor(a!) q_out, Tensor(b!) k_out, Tensor q, Tensor? k, Tensor cos, Tensor sin, " \
  "int rotary, bool interleaved) -> ()"
#define FASTTX_ROPE_BWD_SCHEMA                                                 \
  "(Tensor(a!) dq, Tensor(b!) dk, Tensor dq_out, Tensor? dk_out, Tensor cos, " \
  "Tensor sin, int rotary, bool interleaved) -> ()"
#define FASTTX_ROPE_INPLACE_SCHEMA \
  "(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, int rotary, bool interleaved) -> ()"

}  // namespace
