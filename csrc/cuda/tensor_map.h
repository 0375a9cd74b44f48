// Tensor maps: what TMA knows of a tensor in global memory. Made on the host.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include "cuda/platform.h"

namespace fasttx {

enum class Swizzle { none = 0, bytes32 = 1, bytes64 = 2, bytes128 = 3 };
enum class Element { bf16, f16, f32 };

struct TensorMap {
  CUtensorMap map;
};

// rank dimensions, innermost first: sizes in elements, strides (of dimensions 1 ..) in bytes,
// multiples of 16; box: what one copy moves. False where the driver refuses or has no such call.
inline bool make_tensor_map(TensorMap* map, Element element, int rank, const void* data,
                            const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                            Swizzle swizzle) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  if (!encode) return false;
  constexpr CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  const uint32_t ones[5] = {1, 1, 1, 1, 1};
  return encode(&map->map, types[static_cast<int>(element)], rank, const_cast<void*>(data),
                reinterpret_cast<const cuuint64_t*>(sizes),
                reinterpret_cast<const cuuint64_t*>(strides), box, ones,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(swizzle)],
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace fasttx
