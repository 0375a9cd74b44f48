// linear: one product with its epilogue; backward the upstream gradient and two products.
#include "cpu/linear.h"

#include "cuda/gemm.h"

namespace fasttx {
namespace {

void forward(Run& run, const fasttx_linear& a) {
  Gemm g = {};
  g.dtype = a.x.dtype;
  g.M = static_cast<int>(a.x.sizes[0]);
  g.N = static_cast<int>(a.weight.sizes[0]);
  g.K = static_cast<int>(a.x.sizes[1]);
  g.a[0] = operand(a.x, false);
  g.b[0] = operand(a.weight, false);
  g.pairs = 1;
  g.e.scale = 1.0f;
  g.e.activation = a.activation;
  g.e.bias = panel_of_vector(a.bias);
  if (a.keep) g.e.pre = panel(a.pre);
  g.e.residual = panel(a.residual);
  g.e.out = panel(a.out);
  gemm(run, g);
}

void backward(Run& run, const fasttx_linear& a) {
  const int M = static_cast<int>(a.x.sizes[0]), N = static_cast<int>(a.weight.sizes[0]),
            K = static_cast<int>(a.x.sizes[1]);
  Panel dpre = panel(a.dout);
  const bool ready = !a.activation && can_be_operand(a.dout);
  if (!ready || a.need & 4) {
    Panel written = {};
    if (!ready && a.need & 3) dpre = written = take_panel(run, M, N);
    upstream_gradient(run, a.x.dtype, a.dout, a.pre, a.activation, make_dropout(0.0, nullptr), 0,
                      written, a.need & 4 ? a.dbias : fasttx_tensor{});
  }
  if (a.need & 2)
    weight_gradient(run, a.x.dtype, 1.0f, operand(dpre, M, N, true), operand(a.x, true), M,
                    a.dweight);
  if (a.need & 1) {
    Gemm g = {};
    g.dtype = a.x.dtype;
    g.M = M, g.N = K, g.K = N;
    g.a[0] = operand(dpre, M, N, false);
    g.b[0] = operand(a.weight, true);
    g.pairs = 1;
    g.e.scale = 1.0f;
    plain_product(run, g, panel(a.dx));
  }
}

}  // namespace
}  // namespace fasttx

FASTTX_API int fasttx_cuda_linear_fwd(const fasttx_linear& a, void* stream) {
  return fasttx::run_on(fasttx::forward, a, nullptr, stream);
}
FASTTX_API int64_t fasttx_cuda_linear_bwd_workspace(const fasttx_linear& a) {
  return fasttx::count_floats(fasttx::backward, a);
}
FASTTX_API int fasttx_cuda_linear_bwd(const fasttx_linear& a, float* workspace, void* stream) {
  return fasttx::run_on(fasttx::backward, a, workspace, stream);
}
