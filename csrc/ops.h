// What every binding in csrc/ops/ needs: stable-ABI tensors as plain structs, statuses as errors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "fasttx.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

int32_t dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FASTTX_F32;
    case ScalarType::BFloat16:
      return FASTTX_BF16;
    case ScalarType::Half:
      return FASTTX_F16;
    case ScalarType::Bool:
      return FASTTX_BOOL;
    case ScalarType::Int:
      return FASTTX_I32;
    case ScalarType::Long:
      return FASTTX_I64;
    default:
      STD_TORCH_CHECK(false, "fasttx: this dtype has no native kernel");
  }
}

[[maybe_unused]] fasttx_tensor view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() <= 4, "fasttx: tensors of at most 4 dimensions, got ", t.dim());
  fasttx_tensor v = {t.data_ptr(), dtype_of(t), {1, 1, 1, 1}, {0, 0, 0, 0}};
  // An empty tensor has no data pointer, yet is there.
  alignas(16) static int64_t nothing = 0;
  if (!v.data) v.data = &nothing;
  for (int64_t i = 0; i < t.dim(); i++) {
    v.sizes[i] = t.size(i);
    v.strides[i] = t.stride(i);
  }
  return v;
}
[[maybe_unused]] fasttx_tensor view(const OptionalTensor& t) {
  return t.has_value() ? view(*t) : fasttx_tensor{};
}

[[maybe_unused]] void check(int status, const char* op) {
  STD_TORCH_CHECK(status == FASTTX_OK, "fasttx ", op, ": ", fasttx_status_text(status));
}

}  // namespace
