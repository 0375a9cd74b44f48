// add_norm as torch ops on the stable ABI.
#include "ops/add_norm.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, add_norm_fwd, (const fasttx_add_norm&))
FASTTX_BY_ISA(int, add_norm_bwd, (const fasttx_add_norm&))

namespace {

std::tuple<Tensor, Tensor, Tensor> add_norm_fwd_outputs(const Tensor& x, FASTTX_ADD_NORM_INPUTS,
                                                        double, double, bool rms, bool prenorm,
                                                        bool wide) {
  const ScalarType dtype = promoted(x.scalar_type(), residual);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) rows *= x.size(d);
  return {empty_contiguous(x, wide ? ScalarType::Float : dtype),
          prenorm ? empty_contiguous(x, dtype) : empty({0}, dtype),
          empty({rms ? 1 : 2, rows}, ScalarType::Float)};
}

void add_norm_fwd_cpu(Tensor out, Tensor total, Tensor stats, Tensor x, FASTTX_ADD_NORM_INPUTS,
                      double eps, double dropout_p, bool rms, bool, bool) {
  const fasttx_add_norm a = forward_arguments(out, total, stats, x, residual, weight, bias, x_bias,
                                              seed, eps, dropout_p, rms);
  check(BY_ISA(add_norm_fwd)(a), "add_norm_fwd");
}

auto add_norm_bwd_outputs(const Tensor& x, const Tensor&, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor& residual,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& x_bias, const OptionalTensor&, double dropout_p,
                          bool, int64_t need) {
  // Without dropout dx is dresidual: one tensor serves both.
  const bool shared = (need & 3) == 3 && dropout_p == 0.0 && residual.has_value() &&
                      residual->scalar_type() == x.scalar_type();
  auto made =
      empty_gradients(x, shared ? need & ~2 : need, x, residual, weight, bias, x_bias);
  if (shared) std::get<1>(made) = std::get<0>(made);
  return made;
}

void add_norm_bwd_cpu(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dx_bias,
                      Tensor x, Tensor stats, OptionalTensor dout, OptionalTensor dtotal,
                      FASTTX_ADD_NORM_INPUTS, double dropout_p, bool rms, int64_t need) {
  if ((need & 3) == 3 && dx.data_ptr() == dresidual.data_ptr()) need &= ~2;
  const fasttx_add_norm a =
      backward_arguments(dx, dresidual, dweight, dbias, dx_bias, x, stats, dout, dtotal, residual,
                         weight, bias, x_bias, seed, dropout_p, rms, need);
  check(BY_ISA(add_norm_bwd)(a), "add_norm_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("add_norm_fwd_cpu" FASTTX_ADD_NORM_FWD_SCHEMA);
  m.def("add_norm_bwd_cpu" FASTTX_ADD_NORM_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&add_norm_fwd_cpu, &add_norm_fwd_outputs>(m, "add_norm_fwd_cpu");
  implement<&add_norm_bwd_cpu, &add_norm_bwd_outputs>(m, "add_norm_bwd_cpu");
}
