// embed as torch ops on the stable ABI.
#include "ops/embed.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, embed_fwd, (const fasttx_embed&))
FASTTX_BY_ISA(int, embed_bwd, (const fasttx_embed&))

namespace {

std::tuple<Tensor, Tensor> embed_fwd_outputs(FASTTX_EMBED_TABLES, FASTTX_EMBED_IDS, double, double,
                                             bool wide) {
  const ScalarType tokens = token_weight.scalar_type();
  const ScalarType dtype = promoted(promoted(tokens, position_weight), segment_weight);
  const int64_t B = input_ids.size(0), S = input_ids.size(1);
  return {empty({B, S, token_weight.size(1)}, wide ? ScalarType::Float : dtype),
          empty({norm == 0 ? 0 : norm == 1 ? 2 : 1, B * S}, ScalarType::Float)};
}

auto embed_bwd_outputs(FASTTX_EMBED_TABLES, const Tensor&, const Tensor&, FASTTX_EMBED_IDS, double,
                       int64_t need) {
  return empty_gradients(token_weight, need, FASTTX_EMBED_GIVEN_TABLES);
}

void embed_fwd_cpu(Tensor out, Tensor stats, FASTTX_EMBED_TABLES, FASTTX_EMBED_IDS, double eps,
                   double dropout_p, bool) {
  const fasttx_embed a = forward_arguments(out, stats, FASTTX_EMBED_GIVEN_TABLES,
                                           FASTTX_EMBED_GIVEN_IDS, eps, dropout_p);
  check(BY_ISA(embed_fwd)(a), "embed_fwd");
}

void embed_bwd_cpu(Tensor dtoken, Tensor dposition, Tensor dsegment, Tensor dnorm_weight,
                   Tensor dnorm_bias, FASTTX_EMBED_TABLES, Tensor stats, Tensor dout,
                   FASTTX_EMBED_IDS, double dropout_p, int64_t need) {
  const fasttx_embed a = backward_arguments(
      dtoken, dposition, dsegment, dnorm_weight, dnorm_bias, FASTTX_EMBED_GIVEN_TABLES, stats, dout,
      FASTTX_EMBED_GIVEN_IDS, dropout_p, need);
  check(BY_ISA(embed_bwd)(a), "embed_bwd");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("embed_fwd_cpu" FASTTX_EMBED_FWD_SCHEMA);
  m.def("embed_bwd_cpu" FASTTX_EMBED_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&embed_fwd_cpu, &embed_fwd_outputs>(m, "embed_fwd_cpu");
  implement<&embed_bwd_cpu, &embed_bwd_outputs>(m, "embed_bwd_cpu");
}
