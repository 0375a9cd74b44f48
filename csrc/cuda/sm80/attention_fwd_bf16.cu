// The attention forward in bf16.
#include "cuda/sm80/attention_fwd.h"

namespace fasttx {

int attention_fwd_bf16(const Attention& p, void* stream) { return launch_forward<bf16>(p, stream); }

}  // namespace fasttx
