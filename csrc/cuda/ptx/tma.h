// TMA (sm_90): boxes of a tensor between global and shared memory, issued by one thread.
// Coordinates are in elements, innermost first; what lies outside the tensor is read as zero and
// not written.
#pragma once
#include "cuda/tensor_map.h"

namespace fasttx {

// Counts the box's bytes at the mbarrier when they are there.
FASTTX_DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(mbarrier), "r"(x), "r"(y)
      : "memory");
}
FASTTX_DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x, int y,
                            int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(mbarrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
FASTTX_DEVICE void tma_store(const TensorMap* map, uint32_t from, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(from), "r"(x), "r"(y)
      : "memory");
}
FASTTX_DEVICE void tma_store(const TensorMap* map, uint32_t from, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(from), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// Adds the box to what is there.
FASTTX_DEVICE void tma_reduce_add(const TensorMap* map, uint32_t from, int x, int y) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::
          "l"(map),
      "r"(from), "r"(x), "r"(y)
      : "memory");
}
// Without a tensor map: contiguous bytes, a multiple of 16, aligned to 16.
FASTTX_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(mbarrier)
      : "memory");
}
FASTTX_DEVICE void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}
FASTTX_DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the shared memory of all but N groups has been read.
template <int N>
FASTTX_DEVICE void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Until all but N groups are done, their writes too.
template <int N>
FASTTX_DEVICE void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// Makes ordinary writes to shared memory visible to TMA and wgmma.
FASTTX_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace fasttx
