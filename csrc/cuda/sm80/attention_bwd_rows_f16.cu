// attention's dq, the table's sums and the mask's gradient in f16.
#include "cuda/sm80/attention_bwd_mask.h"

namespace fasttx {

int attention_bwd_rows_f16(const Backward& f, bool plain, void* stream) {
  return launch_backward_side<f16, false>(f, plain, stream);
}
int attention_bwd_mask_f16(const Attention& p, void* stream) {
  return launch_backward_mask<f16>(p, stream);
}

}  // namespace fasttx
