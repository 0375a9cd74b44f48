#include "cuda/sm90/attention_fwd.h"

namespace fasttx {

int attention_fwd_sm90_bf16(const Attention& p, void* stream) {
  return start_forward<bf16>(p, stream);
}

}  // namespace fasttx
