// The native op library and its threads; each op adds its kernels in csrc/ops/<op>.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string.h>

#include "ops_direct.h"

namespace fasttx {
namespace {
fasttx_op* first_op = nullptr;
}
void add_op(fasttx_op* op) {
  op->next = first_op;
  first_op = op;
}
}  // namespace fasttx

const fasttx_op* fasttx_find_op(const char* name) {
  const fasttx_op* op = fasttx::first_op;
  while (op && strcmp(op->name, name) != 0) op = op->next;
  return op;
}

int64_t fasttx_plain_elements(void* tensor) {
  const auto t = static_cast<AtenTensorHandle>(tensor);
  int32_t layout, device;
  if (aoti_torch_get_layout(t, &layout) || layout != aoti_torch_layout_strided()) return -1;
  if (aoti_torch_get_device_type(t, &device) || device != aoti_torch_device_type_cpu()) return -1;
  void* data;
  int64_t elements;
  if (aoti_torch_get_data_ptr(t, &data) || aoti_torch_get_numel(t, &elements)) return -1;
  return data || !elements ? elements : -1;
}
int64_t fasttx_tensor_size(void* tensor, int64_t dim) {
  int64_t dims, size;
  const auto t = static_cast<AtenTensorHandle>(tensor);
  if (aoti_torch_get_dim(t, &dims) || dim >= dims) return -1;
  return aoti_torch_get_size(t, dim, &size) ? -1 : size;
}
const int64_t* fasttx_float_sizes(void* tensor, int64_t* dims) {
  const auto t = static_cast<AtenTensorHandle>(tensor);
  int32_t dtype, device;
  int64_t* sizes;
  if (aoti_torch_get_device_type(t, &device) || device != aoti_torch_device_type_cpu()) return nullptr;
  if (aoti_torch_get_dtype(t, &dtype) ||
      (dtype != aoti_torch_dtype_float32() && dtype != aoti_torch_dtype_bfloat16() &&
       dtype != aoti_torch_dtype_float16()))
    return nullptr;
  return aoti_torch_get_dim(t, dims) || aoti_torch_get_sizes(t, &sizes) ? nullptr : sizes;
}
int fasttx_grad_mode(void) { return aoti_torch_grad_mode_is_enabled(); }

namespace {

void run_on_torch_threads(int64_t n, void (*task)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(context, i);
  });
}
int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }
[[maybe_unused]] const bool threads_set =
    (fasttx_set_threads(run_on_torch_threads, torch_threads), true);

}  // namespace

STABLE_TORCH_LIBRARY(fasttx_native, m) {}
