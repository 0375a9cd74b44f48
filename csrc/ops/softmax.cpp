// softmax and log_softmax as torch ops on the stable ABI.
#include "cpu/softmax.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, softmax_fwd, (const fasttx_softmax&))
FASTTX_BY_ISA(int, softmax_bwd, (const fasttx_softmax&))

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

void softmax_fwd_cpu(Tensor out, Tensor x, OptionalTensor mask, double scale, bool causal,
                     bool lower_right, bool log, bool) {
  fasttx_softmax a = {};
  a.x = columns_last(x);
  a.mask = columns_last(mask);
  a.out = columns_last(out);
  a.scale = scale;
  a.causal = causal;
  a.lower_right = lower_right;
  a.log = log;
  check(BY_ISA(softmax_fwd)(a), "softmax_fwd");
}

void softmax_bwd_cpu(Tensor dx, Tensor dmask, Tensor dout, Tensor out, Tensor x,
                     OptionalTensor mask, double scale, bool causal, bool lower_right, bool log,
                     int64_t need) {
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
  check(BY_ISA(softmax_bwd)(a), "softmax_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "softmax_fwd_cpu(Tensor(a!) out, Tensor x, Tensor? mask, float scale, bool causal, "
      "bool lower_right, bool log, bool wide) -> ()");
  m.def(
      "softmax_bwd_cpu(Tensor(a!) dx, Tensor(b!) dmask, Tensor dout, Tensor out, Tensor x, "
      "Tensor? mask, float scale, bool causal, bool lower_right, bool log, int need) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&softmax_fwd_cpu>(m, "softmax_fwd_cpu");
  implement<&softmax_bwd_cpu>(m, "softmax_bwd_cpu");
}
