// attention's CUDA kernels as torch ops on the stable ABI.
#include "ops/attention.h"

#include "ops/cuda/binding.h"

FASTTX_API int fasttx_cuda_attention_fwd(const fasttx_attention& a, float* workspace, void* stream);
FASTTX_API int64_t fasttx_cuda_attention_fwd_workspace(const fasttx_attention& a);
FASTTX_API int fasttx_cuda_attention_bwd(const fasttx_attention& a, float* workspace, void* stream);
FASTTX_API int64_t fasttx_cuda_attention_bwd_workspace(const fasttx_attention& a);

namespace {

void attention_fwd_cuda(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                        FASTTX_ATTENTION_INPUTS) {
  const fasttx_attention a = forward_arguments(out, lse, q, k, v, FASTTX_ATTENTION_ARGUMENTS);
  const Tensor space = workspace(q, fasttx_cuda_attention_fwd_workspace(a));
  check_cuda(fasttx_cuda_attention_fwd(a, floats(space), current_stream(q)), "attention_fwd", q, k,
             v);
}

void attention_bwd_cuda(Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dtable, Tensor dout,
                        OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                        FASTTX_ATTENTION_INPUTS, int64_t need) {
  const fasttx_attention a = backward_arguments(dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out,
                                                lse, FASTTX_ATTENTION_ARGUMENTS, need);
  const Tensor space = workspace(q, fasttx_cuda_attention_bwd_workspace(a));
  check_cuda(fasttx_cuda_attention_bwd(a, floats(space), current_stream(q)), "attention_bwd", q, k,
             v);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("attention_fwd_cuda" FASTTX_ATTENTION_FWD_SCHEMA);
  m.def("attention_bwd_cuda" FASTTX_ATTENTION_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("attention_fwd_cuda", TORCH_BOX(&attention_fwd_cuda));
  m.impl("attention_bwd_cuda", TORCH_BOX(&attention_bwd_cuda));
}
