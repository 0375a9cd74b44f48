#include "cuda/sm90/attention_bwd_main.h"

int fasttx::attention_bwd_main_128_f16(const AttentionBwd& c, bool general, void* stream) {
  return attention_bwd_main<f16, 128>(c, general, stream);
}
