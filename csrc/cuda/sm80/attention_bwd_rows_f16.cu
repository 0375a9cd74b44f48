// attention's dq and the table's sums in f16.
#include "cuda/sm80/attention_bwd.h"

namespace fasttx {

int attention_bwd_rows_f16(const Backward& f, void* stream) {
  return launch_backward_side<f16, false>(f, stream);
}

}  // namespace fasttx
