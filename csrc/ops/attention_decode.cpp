// attention_decode and cache_append as torch ops on the stable ABI.
#include "ops/attention_decode.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, attention_decode_fwd, (const fasttx_decode&))
FASTTX_BY_ISA(int, cache_append, (const fasttx_decode&))

namespace {

std::tuple<Tensor> attention_decode_fwd_outputs(Tensor q, Tensor, Tensor v_cache, Tensor,
                                                OptionalTensor, OptionalTensor, OptionalTensor,
                                                OptionalTensor, OptionalTensor, OptionalTensor,
                                                double, double, int64_t, int64_t) {
  return {empty_heads(q, v_cache.size(3))};
}

void attention_decode_fwd_cpu(Tensor out, FASTTX_DECODE_INPUTS) {
  const fasttx_decode a = decode_arguments(out, FASTTX_DECODE_GIVEN);
  check(BY_ISA(attention_decode_fwd)(a), "attention_decode");
}

void cache_append_inplace_cpu(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths,
                              OptionalTensor block_table) {
  const fasttx_decode a = append_arguments(k_cache, v_cache, k, v, lengths, block_table);
  check(BY_ISA(cache_append)(a), "cache_append");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def("attention_decode_fwd_cpu" FASTTX_ATTENTION_DECODE_FWD_SCHEMA);
  m.def("cache_append_inplace_cpu" FASTTX_CACHE_APPEND_INPLACE_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&attention_decode_fwd_cpu, &attention_decode_fwd_outputs>(m,
                                                                      "attention_decode_fwd_cpu");
  implement<&cache_append_inplace_cpu>(m, "cache_append_inplace_cpu");
}
