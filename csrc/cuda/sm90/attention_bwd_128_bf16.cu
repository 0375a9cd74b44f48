#include "cuda/sm90/attention_bwd_main.h"

int fasttx::attention_bwd_main_128_bf16(const AttentionBwd& c, bool general, void* stream) {
  return attention_bwd_main<bf16, 128>(c, general, stream);
}
