#pragma once
#include "cuda/platform.h"

namespace fasttx {

inline void barrier_sync(int id, int threads) { emulator::barrier(id, threads, false); }
inline void barrier_arrive(int id, int threads) { emulator::barrier(id, threads, true); }

}  // namespace fasttx
