// attention_decode and cache_append as torch ops on the stable ABI.
#include "cpu/attention_decode.h"

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

void attention_decode_fwd_cpu(Tensor out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,
                              OptionalTensor start, OptionalTensor block_table,
                              OptionalTensor slopes, OptionalTensor positions, OptionalTensor table,
                              OptionalTensor lut, double scale, double softcap, int64_t left,
                              int64_t right) {
  fasttx_decode a = {};
  a.out = view(out);
  a.q = view(q);
  a.k = view(k_cache);
  a.v = view(v_cache);
  a.lengths = view(lengths);
  a.start = view(start);
  a.block_table = view(block_table);
  a.slopes = view(slopes);
  a.positions = view(positions);
  a.table = view(table);
  a.lut = view(lut);
  a.scale = scale;
  a.softcap = softcap;
  a.left = left;
  a.right = right;
  check(BY_ISA(attention_decode_fwd)(a), "attention_decode");
}

void cache_append_inplace_cpu(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths,
                              OptionalTensor block_table) {
  fasttx_decode a = {};
  a.k = view(k_cache);
  a.v = view(v_cache);
  a.k_new = view(k);
  a.v_new = view(v);
  a.lengths = view(lengths);
  a.block_table = view(block_table);
  check(BY_ISA(cache_append)(a), "cache_append");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "attention_decode_fwd_cpu(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, "
      "Tensor lengths, Tensor? start, Tensor? block_table, Tensor? slopes, Tensor? positions, "
      "Tensor? table, Tensor? lut, float scale, float softcap, int left, int right) -> ()");
  m.def(
      "cache_append_inplace_cpu(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor lengths, Tensor? block_table) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&attention_decode_fwd_cpu, &attention_decode_fwd_outputs>(m,
                                                                      "attention_decode_fwd_cpu");
  m.impl("cache_append_inplace_cpu", TORCH_BOX(&cache_append_inplace_cpu));
}
