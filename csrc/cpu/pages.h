// Memory of large fresh outputs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>

#if defined(__linux__)
#include <glob.h>
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

// Whether this is a guest whose freed pages go back to its host (virtio balloon, free page reporting:
// feature bit 5). Large ones go first, and each is fetched again for more (4 ms measured) than its
// small ones cost; only where pages are most of the work is that still less.
inline bool freed_pages_leave() {
#if defined(__linux__)
  static const bool leave = [] {
    bool found = false;
    glob_t paths;
    if (glob("/sys/bus/virtio/drivers/virtio_balloon/virtio*/features", 0, nullptr, &paths) == 0) {
      for (size_t i = 0; i < paths.gl_pathc; i++) {
        char bits[7] = "";
        if (FILE* file = fopen(paths.gl_pathv[i], "r")) {
          found |= fgets(bits, sizeof bits, file) && bits[5] == '1';
          fclose(file);
        }
      }
      globfree(&paths);
    }
    return found;
  }();
  return leave;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
