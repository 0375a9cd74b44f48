#pragma once
#include "cuda/platform.h"

namespace fasttx {

inline void mbarrier_init(uint32_t b, int arrivals) {
  emulator::shared_pointer(b, 8, 8);
  if (arrivals < 1) emulator::fault("an mbarrier of no arrivals");
  emulator::MBarrier m;
  m.expected = m.pending = arrivals;
  emulator::block.mbarriers[b] = m;
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive_expect(uint32_t b, uint32_t bytes) {
  emulator::MBarrier& m = emulator::mbarrier(b);
  m.bytes += bytes;
  m.pending--;
  emulator::mbarrier_progress(m);
}
inline void mbarrier_arrive(uint32_t b) { mbarrier_arrive_expect(b, 0); }
inline void mbarrier_wait(uint32_t b, uint32_t parity) {
  emulator::MBarrier& m = emulator::mbarrier(b);
  emulator::wait("an mbarrier", [&m, parity] { return m.phase != parity; });
}

}  // namespace fasttx
