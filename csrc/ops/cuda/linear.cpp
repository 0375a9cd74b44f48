// linear's CUDA kernels as torch ops on the stable ABI.
#include "ops/linear.h"

#include "ops/cuda/binding.h"

FASTTX_API int fasttx_cuda_linear_fwd(const fasttx_linear& a, void* stream);
FASTTX_API int fasttx_cuda_linear_bwd(const fasttx_linear& a, float* workspace, void* stream);
FASTTX_API int64_t fasttx_cuda_linear_bwd_workspace(const fasttx_linear& a);

namespace {

void linear_fwd_cuda(Tensor out, Tensor pre, Tensor x, Tensor weight, OptionalTensor bias,
                     OptionalTensor residual, int64_t activation, bool keep) {
  const fasttx_linear a =
      forward_arguments(out, pre, x, weight, bias, residual, activation, keep);
  check_cuda(fasttx_cuda_linear_fwd(a, current_stream(x)), "linear_fwd", x, weight);
}

void linear_bwd_cuda(Tensor dx, Tensor dweight, Tensor dbias, Tensor x, Tensor weight,
                     OptionalTensor pre, Tensor dout, int64_t activation, int64_t need) {
  const fasttx_linear a =
      backward_arguments(dx, dweight, dbias, x, weight, pre, dout, activation, need);
  const Tensor space = workspace(x, fasttx_cuda_linear_bwd_workspace(a));
  check_cuda(fasttx_cuda_linear_bwd(a, floats(space), current_stream(x)), "linear_bwd", x, weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("linear_fwd_cuda" FASTTX_LINEAR_FWD_SCHEMA);
  m.def("linear_bwd_cuda" FASTTX_LINEAR_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("linear_fwd_cuda", TORCH_BOX(&linear_fwd_cuda));
  m.impl("linear_bwd_cuda", TORCH_BOX(&linear_bwd_cuda));
}
