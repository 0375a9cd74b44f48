// Memory of large fresh outputs.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fasttx::FASTTX_ISA {
namespace {

// A fresh output of many pages is written several times faster in large ones. Below this size malloc
// keeps what was freed, whose pages are there already.
constexpr size_t MANY_PAGES = 8u << 20;

inline void prefer_large_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < MANY_PAGES) return;
  const uintptr_t first = ((uintptr_t)data + 4095) & ~(uintptr_t)4095;
  const uintptr_t last = ((uintptr_t)data + bytes) & ~(uintptr_t)4095;
  madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
