// cross_entropy's CUDA kernels as torch ops on the stable ABI.
#include "ops/cross_entropy.h"

#include "ops/cuda/binding.h"

FASTTX_API int fasttx_cuda_cross_entropy_fwd(const fasttx_cross_entropy& a, float* workspace,
                                             void* stream);
FASTTX_API int fasttx_cuda_cross_entropy_bwd(const fasttx_cross_entropy& a, float* workspace,
                                             void* stream);
FASTTX_API int fasttx_cuda_cross_entropy_inplace(const fasttx_cross_entropy& a, float* workspace,
                                                 void* stream);
FASTTX_API int fasttx_cuda_cross_entropy_rescale(const fasttx_cross_entropy& a, void* stream);

namespace {

Tensor space_for(const Tensor& logits, const Tensor& target) {
  return workspace(logits, target.numel() + 3);
}

void cross_entropy_fwd_cuda(Tensor loss, Tensor peak, Tensor log_sum, Tensor norm, Tensor logits,
                            Tensor target, OptionalTensor weight, int64_t ignore_index,
                            int64_t reduction, double label_smoothing, double z_loss) {
  const fasttx_cross_entropy a = fwd_arguments(loss, peak, log_sum, norm, logits, target, weight,
                                               ignore_index, reduction, label_smoothing, z_loss);
  const Tensor space = space_for(logits, target);
  check_cuda(fasttx_cuda_cross_entropy_fwd(a, floats(space), current_stream(logits)),
             "cross_entropy_fwd", logits);
}

void cross_entropy_bwd_cuda(Tensor dlogits, Tensor dloss, Tensor logits, Tensor target,
                            OptionalTensor weight, Tensor peak, Tensor log_sum, Tensor norm,
                            int64_t ignore_index, int64_t reduction, double label_smoothing,
                            double z_loss) {
  const fasttx_cross_entropy a =
      bwd_arguments(dlogits, dloss, logits, target, weight, peak, log_sum, norm, ignore_index,
                    reduction, label_smoothing, z_loss);
  const Tensor space = space_for(logits, target);
  check_cuda(fasttx_cuda_cross_entropy_bwd(a, floats(space), current_stream(logits)),
             "cross_entropy_bwd", logits);
}

void cross_entropy_inplace_cuda(Tensor loss, Tensor factor, Tensor logits, Tensor target,
                                OptionalTensor weight, int64_t ignore_index, int64_t reduction,
                                double label_smoothing, double z_loss) {
  const fasttx_cross_entropy a = inplace_arguments(
      loss, factor, logits, target, weight, ignore_index, reduction, label_smoothing, z_loss);
  const Tensor space = space_for(logits, target);
  check_cuda(fasttx_cuda_cross_entropy_inplace(a, floats(space), current_stream(logits)),
             "cross_entropy_inplace", logits);
}

void cross_entropy_rescale_cuda(Tensor grad, Tensor dloss, Tensor factor, Tensor target,
                                int64_t ignore_index) {
  const fasttx_cross_entropy a = rescale_arguments(grad, dloss, factor, target, ignore_index);
  check_cuda(fasttx_cuda_cross_entropy_rescale(a, current_stream(grad)), "cross_entropy_rescale",
             grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("cross_entropy_fwd_cuda" FASTTX_CROSS_ENTROPY_FWD_SCHEMA);
  m.def("cross_entropy_bwd_cuda" FASTTX_CROSS_ENTROPY_BWD_SCHEMA);
  m.def("cross_entropy_inplace_cuda" FASTTX_CROSS_ENTROPY_INPLACE_SCHEMA);
  m.def("cross_entropy_rescale_cuda" FASTTX_CROSS_ENTROPY_RESCALE_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("cross_entropy_fwd_cuda", TORCH_BOX(&cross_entropy_fwd_cuda));
  m.impl("cross_entropy_bwd_cuda", TORCH_BOX(&cross_entropy_bwd_cuda));
  m.impl("cross_entropy_inplace_cuda", TORCH_BOX(&cross_entropy_inplace_cuda));
  m.impl("cross_entropy_rescale_cuda", TORCH_BOX(&cross_entropy_rescale_cuda));
}
