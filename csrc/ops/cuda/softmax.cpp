// softmax's CUDA kernels as torch ops on the stable ABI.
#include "ops/softmax.h"

#include "ops/cuda/binding.h"

FASTTX_API int fasttx_cuda_softmax_fwd(const fasttx_softmax& a, void* stream);
FASTTX_API int fasttx_cuda_softmax_bwd(const fasttx_softmax& a, float* workspace, void* stream);
FASTTX_API int64_t fasttx_cuda_softmax_bwd_workspace(const fasttx_softmax& a);

namespace {

void softmax_fwd_cuda(Tensor out, Tensor x, OptionalTensor mask, double scale, bool causal,
                      bool lower_right, bool log, bool) {
  const fasttx_softmax a = forward_arguments(out, x, mask, scale, causal, lower_right, log);
  check_cuda(fasttx_cuda_softmax_fwd(a, current_stream(x)), "softmax_fwd", x);
}

void softmax_bwd_cuda(Tensor dx, Tensor dmask, Tensor dout, Tensor out, Tensor x, OptionalTensor,
                      double scale, bool causal, bool lower_right, bool log, int64_t need) {
  const fasttx_softmax a =
      backward_arguments(dx, dmask, dout, out, x, scale, causal, lower_right, log, need);
  const Tensor space = workspace(x, fasttx_cuda_softmax_bwd_workspace(a));
  check_cuda(fasttx_cuda_softmax_bwd(a, floats(space), current_stream(x)), "softmax_bwd", x, dmask);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("softmax_fwd_cuda" FASTTX_SOFTMAX_FWD_SCHEMA);
  m.def("softmax_bwd_cuda" FASTTX_SOFTMAX_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("softmax_fwd_cuda", TORCH_BOX(&softmax_fwd_cuda));
  m.impl("softmax_bwd_cuda", TORCH_BOX(&softmax_bwd_cuda));
}
