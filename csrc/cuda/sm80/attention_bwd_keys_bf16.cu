// attention's dk and dv in bf16.
#include "cuda/sm80/attention_bwd.h"

namespace fasttx {

int attention_bwd_keys_bf16(const Backward& f, void* stream) {
  return launch_backward_side<bf16, true>(f, stream);
}

}  // namespace fasttx
