// ffn's CUDA kernels as torch ops on the stable ABI.
#include "ops/ffn.h"

#include "ops/cuda/binding.h"

FASTTX_API int fasttx_cuda_ffn_fwd(const fasttx_ffn& a, float* workspace, void* stream);
FASTTX_API int fasttx_cuda_ffn_bwd(const fasttx_ffn& a, float* workspace, void* stream);
FASTTX_API int64_t fasttx_cuda_ffn_fwd_workspace(const fasttx_ffn& a);
FASTTX_API int64_t fasttx_cuda_ffn_bwd_workspace(const fasttx_ffn& a);

namespace {

void ffn_fwd_cuda(Tensor out, Tensor pre, Tensor pre_gate, Tensor x, Tensor w1, OptionalTensor b1,
                  Tensor w2, OptionalTensor b2, OptionalTensor w_gate, OptionalTensor b_gate,
                  OptionalTensor seed, int64_t activation, double hidden_dropout_p,
                  double dropout_p, bool keep) {
  const fasttx_ffn a =
      forward_arguments(out, pre, pre_gate, x, w1, b1, w2, b2, w_gate, b_gate, seed, activation,
                        hidden_dropout_p, dropout_p, keep);
  const Tensor space = workspace(x, fasttx_cuda_ffn_fwd_workspace(a));
  check_cuda(fasttx_cuda_ffn_fwd(a, floats(space), current_stream(x)), "ffn_fwd", x, w1, w2);
}

void ffn_bwd_cuda(Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dw_gate,
                  Tensor db_gate, Tensor x, OptionalTensor pre, OptionalTensor pre_gate,
                  Tensor dout, Tensor w1, OptionalTensor b1, Tensor w2, OptionalTensor w_gate,
                  OptionalTensor b_gate, OptionalTensor seed, int64_t activation,
                  double hidden_dropout_p, double dropout_p, int64_t need) {
  const fasttx_ffn a =
      backward_arguments(dx, dw1, db1, dw2, db2, dw_gate, db_gate, x, pre, pre_gate, dout, w1, b1,
                         w2, w_gate, b_gate, seed, activation, hidden_dropout_p, dropout_p, need);
  const Tensor space = workspace(x, fasttx_cuda_ffn_bwd_workspace(a));
  check_cuda(fasttx_cuda_ffn_bwd(a, floats(space), current_stream(x)), "ffn_bwd", x, w1, w2);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("ffn_fwd_cuda" FASTTX_FFN_FWD_SCHEMA);
  m.def("ffn_bwd_cuda" FASTTX_FFN_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("ffn_fwd_cuda", TORCH_BOX(&ffn_fwd_cuda));
  m.impl("ffn_bwd_cuda", TORCH_BOX(&ffn_bwd_cuda));
}
