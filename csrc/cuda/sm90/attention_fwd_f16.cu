// The fp16 kernels, and the choice of the dtype.
#include "cuda/sm90/attention_fwd.h"

namespace fasttx {

int attention_fwd_sm90_bf16(const Attention& p, void* stream);

int attention_fwd_sm90(const Attention& p, void* stream) {
  return p.a.q.dtype == FASTTX_BF16 ? attention_fwd_sm90_bf16(p, stream)
                                    : start_forward<f16>(p, stream);
}

const char* attention_fwd_sm90_refuses(const Attention& p) {
  for (const fasttx_tensor* t : {&p.a.q, &p.a.k, &p.a.v})
    if (const char* reason = tma_refuses(*t)) return reason;
  return nullptr;
}

}  // namespace fasttx
