// What the kernels need of CUDA besides instructions: launches, the shared memory of a block, sizes
// of the device. Every file in csrc/cuda is C++ that nvcc compiles for a GPU and, with the headers
// of tests/emulator in place of this one and of ptx/, any C++ compiler for the emulator.
#pragma once
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#define FASTTX_DEVICE __device__ __forceinline__
// Not inlined: what is rare must not cost the rest registers.
#define FASTTX_RARE __device__ __noinline__
// The kernel's only shared memory; the launch says how many bytes.
#define FASTTX_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace fasttx {

// kernel(arguments) on the grid; a cudaError_t.
template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared, void* stream,
           const Arguments& arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 << 10) {
    const cudaError_t status = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernel(function, grid, dim3(threads), pointers, shared,
                          static_cast<cudaStream_t>(stream));
}

// Whether the library holds the kernel for the current device: a cudaError_t.
template <class Arguments>
int has_image(void (*kernel)(Arguments)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}
// 90 for 9.0.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return 0;
  return 10 * major + minor;
}

}  // namespace fasttx
