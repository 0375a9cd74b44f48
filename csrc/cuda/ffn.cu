// ffn: two products with their epilogues; backward the product that makes the hidden layer's
// gradients and the layer itself again, then plain products.
#include "cpu/ffn.h"

#include "cuda/gemm.h"

namespace fasttx {
namespace {

enum Place : uint32_t { HIDDEN, OUTPUT };  // dropout's

struct Sizes {
  int M, K, F, N;
};
Sizes sizes_of(const fasttx_ffn& a) {
  return {static_cast<int>(a.x.sizes[0]), static_cast<int>(a.x.sizes[1]),
          static_cast<int>(a.w1.sizes[0]), static_cast<int>(a.w2.sizes[0])};
}

// x w1^T beside x w_gate^T, with their biases and no activation yet.
Gemm first_product(const fasttx_ffn& a) {
  const Sizes s = sizes_of(a);
  Gemm g = {};
  g.dtype = a.x.dtype;
  g.M = s.M, g.N = s.F, g.K = s.K;
  g.a[0] = operand(a.x, false);
  g.b[0] = operand(a.w1, false);
  g.pairs = 1;
  g.e.scale = 1.0f;
  g.e.bias = panel_of_vector(a.b1);
  if (a.w_gate.data) {
    g.gated = 1;
    g.b[1] = operand(a.w_gate, false);
    g.e.gate_bias = panel_of_vector(a.b_gate);
  }
  return g;
}

void forward(Run& run, const fasttx_ffn& a) {
  const Sizes s = sizes_of(a);
  const Panel h = take_panel(run, s.M, s.F);
  Gemm g = first_product(a);
  g.e.activation = a.activation;
  g.e.dropout = make_dropout(a.hidden_dropout_p, a.seed);
  g.e.place = HIDDEN;
  g.e.out = h;
  if (a.keep) {
    g.e.pre = panel(a.pre);
    if (g.gated) g.e.pre_gate = panel(a.pre_gate);
  }
  gemm(run, g);

  g = {};
  g.dtype = a.x.dtype;
  g.M = s.M, g.N = s.N, g.K = s.F;
  g.a[0] = operand(h, s.M, s.F, false);
  g.b[0] = operand(a.w2, false);
  g.pairs = 1;
  g.e.scale = 1.0f;
  g.e.bias = panel_of_vector(a.b2);
  g.e.dropout = make_dropout(a.dropout_p, a.seed);
  g.e.place = OUTPUT;
  g.e.out = panel(a.out);
  gemm(run, g);
}

void backward(Run& run, const fasttx_ffn& a) {
  const Sizes s = sizes_of(a);
  const int dtype = a.x.dtype;
  const bool gated = a.w_gate.data;

  // What dropout leaves of dout; its scale goes with the products.
  const Dropout dropped = make_dropout(a.dropout_p, a.seed);
  Panel upstream = panel(a.dout);
  const bool ready = !dropped.threshold && can_be_operand(a.dout), more = a.need & ~16;
  if (a.need & 16 || !ready) {
    Panel written = {};
    if (!ready && more) upstream = written = take_panel(run, s.M, s.N);
    upstream_gradient(run, dtype, a.dout, {}, 0, dropped, OUTPUT, written,
                      a.need & 16 ? a.db2 : fasttx_tensor{});
  }
  if (!more) return;

  Gemm g = {};
  g.dtype = dtype;
  g.M = s.M, g.N = s.F, g.K = s.N;
  g.a[0] = operand(upstream, s.M, s.N, false);
  g.b[0] = operand(a.w2, true);
  g.pairs = 1;
  g.e.backward = 1;
  g.e.scale = dropped.scale;
  g.e.activation = a.activation;
  g.e.dropout = make_dropout(a.hidden_dropout_p, a.seed);
  g.e.place = HIDDEN;
  g.e.pre = panel(a.pre);
  if (gated) g.e.pre_gate = panel(a.pre_gate);
  if (!a.pre.data) {
    Gemm again = first_product(a);
    g.e.pre = again.e.pre = take_panel(run, s.M, s.F);
    if (gated) g.e.pre_gate = again.e.pre_gate = take_panel(run, s.M, s.F);
    gemm(run, again);
  }
  if (a.need & 3) g.e.dpre = take_panel(run, s.M, s.F);
  if (gated && a.need & 33) g.e.dgate = take_panel(run, s.M, s.F);
  if (a.need & 8) g.e.h = take_panel(run, s.M, s.F);
  choose_tile(g);
  const int slots = (s.M + 127) / 128 * g.slots;
  if (a.need & 4) g.e.dpre_sums = run.take(int64_t{slots} * s.F);
  if (a.need & 64) g.e.dgate_sums = run.take(int64_t{slots} * s.F);
  const Epilogue e = g.e;
  gemm(run, g);

  if (a.need & 4) sum_parts(run, dtype, panel_of_vector(a.db1), 1, s.F, e.dpre_sums, slots);
  if (a.need & 64) sum_parts(run, dtype, panel_of_vector(a.db_gate), 1, s.F, e.dgate_sums, slots);
  const auto flipped = [&](const Panel& p, int columns) { return operand(p, s.M, columns, true); };
  if (a.need & 2)
    weight_gradient(run, dtype, 1.0f, flipped(e.dpre, s.F), operand(a.x, true), s.M, a.dw1);
  if (a.need & 8)
    weight_gradient(run, dtype, dropped.scale, flipped(upstream, s.N), flipped(e.h, s.F), s.M,
                    a.dw2);
  if (a.need & 32)
    weight_gradient(run, dtype, 1.0f, flipped(e.dgate, s.F), operand(a.x, true), s.M, a.dw_gate);
  if (a.need & 1) {
    g = {};
    g.dtype = dtype;
    g.M = s.M, g.N = s.K, g.K = s.F;
    g.a[0] = operand(e.dpre, s.M, s.F, false);
    g.b[0] = operand(a.w1, true);
    g.pairs = 1;
    if (gated) {
      g.a[1] = operand(e.dgate, s.M, s.F, false);
      g.b[1] = operand(a.w_gate, true);
      g.pairs = 2;
    }
    g.e.scale = 1.0f;
    plain_product(run, g, panel(a.dx));
  }
}

}  // namespace
}  // namespace fasttx

FASTTX_API int64_t fasttx_cuda_ffn_fwd_workspace(const fasttx_ffn& a) {
  return fasttx::count_floats(fasttx::forward, a);
}
FASTTX_API int fasttx_cuda_ffn_fwd(const fasttx_ffn& a, float* workspace, void* stream) {
  return fasttx::run_on(fasttx::forward, a, workspace, stream);
}
FASTTX_API int64_t fasttx_cuda_ffn_bwd_workspace(const fasttx_ffn& a) {
  return fasttx::count_floats(fasttx::backward, a);
}
FASTTX_API int fasttx_cuda_ffn_bwd(const fasttx_ffn& a, float* workspace, void* stream) {
  return fasttx::run_on(fasttx::backward, a, workspace, stream);
}
