// The product of bf16.
#include "cuda/sm90/gemm.h"

namespace fasttx {

int launch_gemm_sm90_bf16(const Gemm& g, void* stream) {
  return sm90_gemm::launch<bf16>(g, stream);
}

}  // namespace fasttx
