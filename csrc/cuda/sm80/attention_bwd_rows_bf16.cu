// attention's dq, the table's sums and the mask's gradient in bf16.
#include "cuda/sm80/attention_bwd_mask.h"

namespace fasttx {

int attention_bwd_rows_bf16(const Backward& f, bool plain, void* stream) {
  return launch_backward_side<bf16, false>(f, plain, stream);
}
int attention_bwd_mask_bf16(const Attention& p, void* stream) {
  return launch_backward_mask<bf16>(p, stream);
}

}  // namespace fasttx
