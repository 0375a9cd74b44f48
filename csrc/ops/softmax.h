// The arguments of softmax's ops as those of its kernels, and the ops' schemas.
#pragma once
#include "cpu/softmax.h"
#include "ops.h"

namespace {

// Four dimensions, the last of them last; stride 0 where the size is 1.
fasttx_tensor columns_last(const Tensor& t) {
  const fasttx_tensor v = view(t);
  fasttx_tensor r = {v.data, v.dtype, {1, 1, 1, 1}, {0, 0, 0, 0}};
  const int64_t missing = 4 - t.dim();
  for (int64_t d = missing; d < 4; d++) {
    r.sizes[d] = v.sizes[d - missing];
    r.strides[d] = r.sizes[d] == 1 ? 0 : v.strides[d - missing];
  }
  return r;
}
fasttx_tensor columns_last(const OptionalTensor& t) {
  return t.has_value() ? columns_last(*t) : fasttx_tensor{};
}

fasttx_softmax forward_arguments(const Tensor& out, const Tensor& x, const OptionalTensor& mask,
                                 double scale, bool causal, bool lower_right, bool log) {
  fasttx_softmax a = {};
  a.x = columns_last(x);
  a.mask = columns_last(mask);
  a.out = columns_last(out);
  a.scale = scale;
  a.causal = causal;
  a.lower_right = lower_right;
  a.log = log;
  return a;
}

fasttx_softmax backward_arguments(const Tensor& dx, const Tensor& dmask, const Tensor& dout,
                                  const Tensor& out, const Tensor& x, double scale, bool causal,
                                  bool lower_right, bool log, int64_t need) {
  fasttx_softmax a = {};
  a.x = columns_last(x);
  a.out = columns_last(out);
  a.dout = columns_last(dout);
  if (need & 1) a.dx = columns_last(dx);
  if (need & 2) a.dmask = columns_last(dmask);
  a.scale = scale;
  a.causal = causal;
  a.lower_right = lower_right;
  a.log = log;
  return a;
}

#define FASTTX_SOFTMAX_FWD_SCHEMA                                                 \
  "(Tensor(a!) out, Tensor x, Tensor? mask, float scale, bool causal, "           \
  "bool lower_right, bool log, bool wide) -> ()"
#define FASTTX_SOFTMAX_BWD_SCHEMA                                                           \
  "(Tensor(a!) dx, Tensor(b!) dmask, Tensor dout, Tensor out, Tensor x, "                   \
  "Tensor? mask, float scale, bool causal, bool lower_right, bool log, int need) -> ()"

}  // namespace
