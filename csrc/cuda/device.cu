// Queries of the CUDA runtime.
#include "cuda/platform.h"
#include "fasttx.h"

FASTTX_API const char* fasttx_cuda_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
FASTTX_API int fasttx_cuda_device_count(void) {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
