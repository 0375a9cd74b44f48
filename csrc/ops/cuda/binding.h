// What the CUDA kernels' bindings need: torch's stream, workspace, and statuses as errors that name
// the kernel and the shapes.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <sstream>

#include "ops.h"

// The emulator of the tests registers the same ops elsewhere, for CPU tensors.
#ifndef FASTTX_CUDA_LIBRARY
#define FASTTX_CUDA_LIBRARY fasttx_native
#define FASTTX_CUDA_KEY CUDA
#endif

FASTTX_API const char* fasttx_cuda_error_text(int status);

namespace {

// torch's current stream on t's device. Its function is in libtorch_cuda, which this library does
// not link, so that one file serves every torch.
[[maybe_unused]] void* current_stream(const Tensor& t) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                              : nullptr);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(find || !t.is_cuda(),
                  "fasttx: libtorch_cuda has no aoti_torch_get_current_cuda_stream");
  if (find) TORCH_ERROR_CODE_CHECK(find(t.get_device_index(), &stream));
  return stream;
}

[[maybe_unused]] Tensor workspace(const Tensor& like, int64_t floats) {
  return torch::stable::new_empty(like, {floats}, ScalarType::Float);
}
[[maybe_unused]] float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

template <class... Tensors>
void check_cuda(int status, const char* kernel, const Tensors&... tensors) {
  if (status == 0) return;
  std::ostringstream shapes;
  auto add = [&](const Tensor& t) {
    shapes << " [";
    for (int64_t i = 0; i < t.dim(); i++) shapes << (i ? ", " : "") << t.size(i);
    shapes << "]";
  };
  (add(tensors), ...);
  STD_TORCH_CHECK(false, "fasttx ", kernel, " (CUDA) on", shapes.str(), ": ",
                  fasttx_cuda_error_text(status));
}

}  // namespace
