// The arguments of cross_entropy's ops as those of its kernels, and the ops' schemas.
#pragma once
#include "cpu/cross_entropy.h"
#include "ops.h"

namespace {

fasttx_cross_entropy common(const Tensor& logits, const Tensor& target,
                            const OptionalTensor& weight, int64_t ignore_index, int64_t reduction,
                            double label_smoothing, double z_loss) {
  fasttx_cross_entropy a = {};
  a.logits = view(logits);
  a.target = view(target);
  a.weight = view(weight);
  a.ignore_index = ignore_index;
  a.reduction = static_cast<int32_t>(reduction);
  a.label_smoothing = label_smoothing;
  a.z_loss = z_loss;
  return a;
}

fasttx_cross_entropy fwd_arguments(Tensor loss, Tensor peak, Tensor log_sum, Tensor norm,
                                   Tensor logits, Tensor target, OptionalTensor weight,
                                   int64_t ignore_index, int64_t reduction, double label_smoothing,
                                   double z_loss) {
  fasttx_cross_entropy a =
      common(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss);
  a.loss = view(loss);
  a.peak = view(peak);
  a.log_sum = view(log_sum);
  a.norm = view(norm);
  return a;
}

fasttx_cross_entropy bwd_arguments(Tensor dlogits, Tensor dloss, Tensor logits, Tensor target,
                                   OptionalTensor weight, Tensor peak, Tensor log_sum, Tensor norm,
                                   int64_t ignore_index, int64_t reduction, double label_smoothing,
                                   double z_loss) {
  fasttx_cross_entropy a =
      common(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss);
  a.dlogits = view(dlogits);
  a.dloss = view(dloss);
  a.peak = view(peak);
  a.log_sum = view(log_sum);
  a.norm = view(norm);
  return a;
}

fasttx_cross_entropy inplace_arguments(Tensor loss, Tensor factor, Tensor logits, Tensor target,
                                       OptionalTensor weight, int64_t ignore_index,
                                       int64_t reduction, double label_smoothing, double z_loss) {
  fasttx_cross_entropy a =
      common(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss);
  a.dlogits = a.logits;
  a.loss = view(loss);
  a.factor = view(factor);
  return a;
}

fasttx_cross_entropy rescale_arguments(Tensor grad, Tensor dloss, Tensor factor, Tensor target,
                                       int64_t ignore_index) {
  fasttx_cross_entropy a = common(grad, target, OptionalTensor(), ignore_index, 0, 0, 0);
  a.dlogits = a.logits;
  a.dloss = view(dloss);
  a.factor = view(factor);
  return a;
}

#define FASTTX_CROSS_ENTROPY_SCALARS \
  "int ignore_index, int reduction, float label_smoothing, float z_loss"
#define FASTTX_CROSS_ENTROPY_FWD_SCHEMA                                      \
  "(Tensor(a!) loss, Tensor(b!) peak, Tensor(c!) log_sum, Tensor(d!) norm, " \
  "Tensor logits, Tensor target, Tensor? weight, " FASTTX_CROSS_ENTROPY_SCALARS ") -> ()"
#define FASTTX_CROSS_ENTROPY_BWD_SCHEMA                                                     \
  "(Tensor(a!) dlogits, Tensor dloss, Tensor logits, Tensor target, "                       \
  "Tensor? weight, Tensor peak, Tensor log_sum, Tensor norm, " FASTTX_CROSS_ENTROPY_SCALARS \
  ") -> ()"
#define FASTTX_CROSS_ENTROPY_INPLACE_SCHEMA                  \
  "(Tensor(a!) loss, Tensor(b!) factor, Tensor(c!) logits, " \
  "Tensor target, Tensor? weight, " FASTTX_CROSS_ENTROPY_SCALARS ") -> ()"
#define FASTTX_CROSS_ENTROPY_RESCALE_SCHEMA                        \
  "(Tensor(a!) grad, Tensor dloss, Tensor factor, Tensor target, " \
  "int ignore_index) -> ()"

}  // namespace
