// attention_decode's and cache_append's CUDA kernels as torch ops on the stable ABI.
#include "ops/attention_decode.h"

#include "ops/cuda/binding.h"

FASTTX_API int64_t fasttx_cuda_attention_decode_workspace(const fasttx_decode& a);
FASTTX_API int fasttx_cuda_attention_decode(const fasttx_decode& a, float* workspace, void* stream);
FASTTX_API int fasttx_cuda_cache_append(const fasttx_decode& a, void* stream);

namespace {

void attention_decode_fwd_cuda(Tensor out, FASTTX_DECODE_INPUTS) {
  const fasttx_decode a = decode_arguments(out, FASTTX_DECODE_GIVEN);
  const Tensor space = workspace(q, fasttx_cuda_attention_decode_workspace(a));
  check_cuda(fasttx_cuda_attention_decode(a, floats(space), current_stream(q)), "attention_decode",
             q, k_cache, v_cache);
}

void cache_append_inplace_cuda(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths,
                               OptionalTensor block_table) {
  const fasttx_decode a = append_arguments(k_cache, v_cache, k, v, lengths, block_table);
  check_cuda(fasttx_cuda_cache_append(a, current_stream(k)), "cache_append", k_cache, k);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("attention_decode_fwd_cuda" FASTTX_ATTENTION_DECODE_FWD_SCHEMA);
  m.def("cache_append_inplace_cuda" FASTTX_CACHE_APPEND_INPLACE_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("attention_decode_fwd_cuda", TORCH_BOX(&attention_decode_fwd_cuda));
  m.impl("cache_append_inplace_cuda", TORCH_BOX(&cache_append_inplace_cuda));
}
