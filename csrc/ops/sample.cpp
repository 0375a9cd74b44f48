// sample as a torch op on the stable ABI.
#include "cpu/sample.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, sample_fwd, (const fasttx_sample&))

namespace {

std::tuple<Tensor> sample_fwd_outputs(const Tensor& logits, const OptionalTensor&, double, int64_t,
                                      double, bool) {
  return {empty({logits.size(0)}, ScalarType::Long)};
}

void sample_fwd_cpu(Tensor ids, Tensor logits, OptionalTensor seed, double factor, int64_t top_k,
                    double top_p, bool greedy) {
  const fasttx_sample a = {view(logits),
                           static_cast<int64_t*>(ids.data_ptr()),
                           seed.has_value() ? seed->data_ptr() : nullptr,
                           static_cast<float>(factor),
                           static_cast<float>(top_p),
                           top_k,
                           greedy};
  check(BY_ISA(sample_fwd)(a), "sample_fwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "sample_fwd_cpu(Tensor(a!) ids, Tensor logits, Tensor? seed, float factor, int top_k, "
      "float top_p, bool greedy) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&sample_fwd_cpu, &sample_fwd_outputs>(m, "sample_fwd_cpu");
}
