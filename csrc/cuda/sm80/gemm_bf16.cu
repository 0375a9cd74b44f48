// The product of bf16.
#include "cuda/sm80/gemm.h"

namespace fasttx {

int launch_gemm_sm80_bf16(const Gemm& g, void* stream) {
  return sm80_gemm::launch<bf16>(g, stream);
}

}  // namespace fasttx
