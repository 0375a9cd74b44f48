// attention's dk and dv in f16.
#include "cuda/sm80/attention_bwd.h"

namespace fasttx {

int attention_bwd_keys_f16(const Backward& f, void* stream) {
  return launch_backward_side<f16, true>(f, stream);
}

}  // namespace fasttx
