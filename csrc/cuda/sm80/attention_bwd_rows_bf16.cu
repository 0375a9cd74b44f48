// attention's dq and the table's sums in bf16.
#include "cuda/sm80/attention_bwd.h"

namespace fasttx {

int attention_bwd_rows_bf16(const Backward& f, void* stream) {
  return launch_backward_side<bf16, false>(f, stream);
}

}  // namespace fasttx
