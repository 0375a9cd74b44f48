// The attention forward in fp16, and the choice of dtype.
#include "cuda/sm80/attention_fwd.h"

namespace fasttx {

int attention_fwd_bf16(const Attention& p, void* stream);

int attention_fwd_sm80(const Attention& p, void* stream) {
  if (p.a.q.dtype == FASTTX_BF16) return attention_fwd_bf16(p, stream);
  return launch_forward<f16>(p, stream);
}

}  // namespace fasttx
