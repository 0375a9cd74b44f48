// The product of fp16, and the choice between the two.
#include "cuda/sm80/gemm.h"

namespace fasttx {

int launch_gemm_sm80_bf16(const Gemm& g, void* stream);

int launch_gemm_sm80(const Gemm& g, void* stream) {
  return g.dtype == FASTTX_BF16 ? launch_gemm_sm80_bf16(g, stream)
                                : sm80_gemm::launch<f16>(g, stream);
}

}  // namespace fasttx
