#include "cuda/sm90/attention_bwd_main.h"

int fasttx::attention_bwd_main_64_f16(const AttentionBwd& c, bool general, void* stream) {
  return attention_bwd_main<f16, 64>(c, general, stream);
}
