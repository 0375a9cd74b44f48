// In place of csrc/cuda/platform.h: CUDA's words, in the emulator.
#pragma once
#include <math.h>
#include <string.h>

#include <algorithm>
#include <type_traits>

#include "engine/engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define FASTTX_DEVICE inline
#define FASTTX_RARE __attribute__((noinline))
#define FASTTX_SHARED(name) unsigned char* const name = emulator::block.shared

#define threadIdx (emulator::running->index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)

using std::max;
using std::min;

struct float2 {
  float x, y;
};

inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

inline void __syncthreads() { emulator::barrier(0, 0, false); }

namespace emulator {
inline Meeting& meeting_of(unsigned mask, const char* what) {
  if (!(mask >> running->lane() & 1))
    fault(std::string(what) + " with a mask that leaves the calling lane out");
  return mask == ~0u ? block.warps[running->warp()] : block.parts[{running->warp(), mask}];
}
template <class T, class Source>
T shuffle(unsigned mask, T value, const char* what, Source source) {
  T result;
  auto work = [&](auto in, auto out) {
    for (int i = 0; i < WARP; i++)
      if (mask >> i & 1) {
        const int from = source(i);
        out(i) = from >= 0 && from < WARP && (mask >> from & 1) ? in(from) : in(i);
      }
  };
  meet(meeting_of(mask, what), running->lane(), __builtin_popcount(mask), what, value, result, work);
  return result;
}
}  // namespace emulator

inline void __syncwarp(unsigned mask = ~0u) {
  emulator::shuffle(mask, 0, "__syncwarp", [](int i) { return i; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulator::shuffle(mask, value, "__shfl_xor_sync", [=](int i) { return i ^ with; });
}
// Each lane names its own source.
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  struct In {
    T value;
    int from;
  } in = {value, from & 31};
  T result;
  auto work = [&](auto in, auto out) {
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) out(i) = in(mask >> in(i).from & 1 ? in(i).from : i).value;
  };
  emulator::meet(emulator::meeting_of(mask, "__shfl_sync"), emulator::running->lane(),
                 __builtin_popcount(mask), "__shfl_sync", in, result, work);
  return result;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  return emulator::shuffle(mask, value, "__shfl_down_sync", [=](int i) { return i + by; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return emulator::shuffle(mask, value, "__shfl_up_sync", [=](int i) { return i - by; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned result = 0;
  auto work = [&](auto in, auto out) {
    unsigned votes = 0;
    for (int i = 0; i < 32; i++)
      if ((mask >> i & 1) && in(i)) votes |= 1u << i;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) out(i) = votes;
  };
  using namespace emulator;
  Meeting& place =
      mask == ~0u ? block.warps[running->warp()] : block.parts[{running->warp(), mask}];
  meet(place, running->lane(), __builtin_popcount(mask), "__ballot_sync", predicate, result, work);
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  const T old = *p;
  *p = old + x;
  return old;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> x) {
  const T old = *p;
  *p = std::max(old, x);
  return old;
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> x) {
  const T old = *p;
  *p = x;
  return old;
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  const T old = *p;
  if (old == expected) *p = x;
  return old;
}
inline void __threadfence() {}

namespace fasttx {

template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared, void*,
           const Arguments& arguments) {
  return emulator::run({grid, dim3(threads), shared, emulator::most_shared()},
                       [&] { kernel(arguments); });
}
template <class Arguments>
int has_image(void (*)(Arguments)) {
  return 0;
}
inline int multiprocessors() { return 3; }
inline int compute_capability() { return emulator::compute_capability; }

}  // namespace fasttx

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline const char* cudaGetErrorString(cudaError_t status) { return emulator::error_text(status); }
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
