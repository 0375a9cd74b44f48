// rope's CUDA kernel as torch ops on the stable ABI.
#include "ops/rope.h"

#include "ops/cuda/binding.h"

FASTTX_API int fasttx_cuda_rope(const fasttx_rope& a, void* stream);

namespace {

void rope_fwd_cuda(Tensor q_out, Tensor k_out, Tensor q, OptionalTensor k, Tensor cos, Tensor sin,
                   int64_t rotary, bool interleaved) {
  const fasttx_rope a = rope_arguments(q_out, k_out, q, k, cos, sin, rotary, interleaved, false);
  check_cuda(fasttx_cuda_rope(a, current_stream(q)), "rope_fwd", q, k_out);
}

void rope_bwd_cuda(Tensor dq, Tensor dk, Tensor dq_out, OptionalTensor dk_out, Tensor cos,
                   Tensor sin, int64_t rotary, bool interleaved) {
  const fasttx_rope a = rope_arguments(dq, dk, dq_out, dk_out, cos, sin, rotary, interleaved, true);
  check_cuda(fasttx_cuda_rope(a, current_stream(dq)), "rope_bwd", dq, dk);
}

void rope_inplace_cuda(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, int64_t rotary,
                       bool interleaved) {
  const fasttx_rope a = rope_arguments(q, k, q, k, cos, sin, rotary, interleaved, false);
  check_cuda(fasttx_cuda_rope(a, current_stream(q)), "rope_inplace", q);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("rope_fwd_cuda" FASTTX_ROPE_FWD_SCHEMA);
  m.def("rope_bwd_cuda" FASTTX_ROPE_BWD_SCHEMA);
  m.def("rope_inplace_cuda" FASTTX_ROPE_INPLACE_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("rope_fwd_cuda", TORCH_BOX(&rope_fwd_cuda));
  m.impl("rope_bwd_cuda", TORCH_BOX(&rope_bwd_cuda));
  m.impl("rope_inplace_cuda", TORCH_BOX(&rope_inplace_cuda));
}
