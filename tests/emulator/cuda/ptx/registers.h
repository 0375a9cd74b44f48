#pragma once
#include "cuda/platform.h"

namespace fasttx {

// By a whole warp. What is taken must have been given: a kernel under __launch_bounds__(threads, 1)
// begins with an equal share of the multiprocessor's registers, rounded down to a multiple of 8.
template <int COUNT>
void registers_give() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  emulator::shuffle(~0u, 0, "setmaxnreg", [](int i) { return i; });
  emulator::block.registers[emulator::running->warp()] = COUNT;
}
template <int COUNT>
void registers_take() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  emulator::shuffle(~0u, 0, "setmaxnreg", [](int i) { return i; });
  std::vector<int>& all = emulator::block.registers;
  int& mine = all[emulator::running->warp()];
  const int share = emulator::launched_registers(static_cast<int>(emulator::block.threads.size()));
  emulator::wait("setmaxnreg, for registers", [&] {
    int others = -mine;
    for (int each : all) others += each;
    if (mine == COUNT || others + COUNT <= share * static_cast<int>(all.size())) mine = COUNT;
    return mine == COUNT;
  });
}
inline uint32_t opaque(uint32_t x) { return x; }

}  // namespace fasttx
