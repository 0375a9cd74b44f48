// add_norm's CUDA kernels as torch ops on the stable ABI.
#include "ops/add_norm.h"

#include "ops/cuda/binding.h"

FASTTX_API int fasttx_cuda_add_norm_fwd(const fasttx_add_norm& a, void* stream);
FASTTX_API int fasttx_cuda_add_norm_bwd(const fasttx_add_norm& a, float* workspace, void* stream);
FASTTX_API int64_t fasttx_cuda_add_norm_bwd_workspace(const fasttx_add_norm& a);

namespace {

void add_norm_fwd_cuda(Tensor out, Tensor total, Tensor stats, Tensor x, FASTTX_ADD_NORM_INPUTS,
                       double eps, double dropout_p, bool rms, bool, bool) {
  const fasttx_add_norm a = forward_arguments(out, total, stats, x, residual, weight, bias, x_bias,
                                              seed, eps, dropout_p, rms);
  check_cuda(fasttx_cuda_add_norm_fwd(a, current_stream(x)), "add_norm_fwd", x);
}

void add_norm_bwd_cuda(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dx_bias,
                       Tensor x, Tensor stats, OptionalTensor dout, OptionalTensor dtotal,
                       FASTTX_ADD_NORM_INPUTS, double dropout_p, bool rms, int64_t need) {
  const fasttx_add_norm a =
      backward_arguments(dx, dresidual, dweight, dbias, dx_bias, x, stats, dout, dtotal, residual,
                         weight, bias, x_bias, seed, dropout_p, rms, need);
  const Tensor space = workspace(x, fasttx_cuda_add_norm_bwd_workspace(a));
  check_cuda(fasttx_cuda_add_norm_bwd(a, floats(space), current_stream(x)), "add_norm_bwd", x);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("add_norm_fwd_cuda" FASTTX_ADD_NORM_FWD_SCHEMA);
  m.def("add_norm_bwd_cuda" FASTTX_ADD_NORM_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("add_norm_fwd_cuda", TORCH_BOX(&add_norm_fwd_cuda));
  m.impl("add_norm_bwd_cuda", TORCH_BOX(&add_norm_bwd_cuda));
}
