// Queries of the CUDA runtime.
#include "cuda/platform.h"
#include "fasttx.h"

FASTTX_API const char* fasttx_cuda_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
__global__ void fasttx_probe(int) {}

// Whether the current device can run this library's kernels: a cudaError_t. The versions of CUDA
// that it was built with, and that the driver can run; 0 where they are unknown.
FASTTX_API int fasttx_cuda_probe(int* built, int* driver) {
  if (cudaRuntimeGetVersion(built) != cudaSuccess) *built = 0;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  return status != cudaSuccess ? status : fasttx::has_image(fasttx_probe);
}
FASTTX_API int fasttx_cuda_device_count(void) {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
