#pragma once
#include "cuda/matrix_descriptor.h"
#include "cuda/ptx/mma.h"

namespace fasttx {

namespace wgmma {

// The address of element (outer, inner): outer along M or N, inner along the inner product.
inline uint32_t element(uint64_t descriptor, bool transposed, int outer, int inner) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff)
                                                                      << 4;
  constexpr Swizzle layouts[] = {Swizzle::none, Swizzle::bytes128, Swizzle::bytes64,
                                 Swizzle::bytes32};
  const Swizzle swizzle = layouts[descriptor >> 62];
  const uint32_t width = 16u << static_cast<int>(swizzle);  // bytes
  if (swizzle != Swizzle::none && (start & (8 * width - 1) & ~(width - 1)))
    emulator::fault("a wgmma matrix that does not begin where its swizzle pattern does");
  uint32_t offset;
  if (!transposed && swizzle != Swizzle::none)
    offset = outer / 8 * stride + outer % 8 * width + inner * 2;
  else if (!transposed)
    offset = outer / 8 * stride + outer % 8 * 16 + inner / 8 * leading + inner % 8 * 2;
  else if (swizzle != Swizzle::none)
    offset =
        outer * 2 / width * leading + outer * 2 % width + inner / 8 * stride + inner % 8 * width;
  else
    offset = outer / 8 * stride + outer % 8 * 2 + inner / 8 * leading + inner % 8 * 16;
  return swizzled(start + offset, swizzle);
}

template <class T>
float value(uint64_t descriptor, bool transposed, int outer, int inner) {
  return to_float(*static_cast<T*>(
      emulator::shared_pointer(element(descriptor, transposed, outer, inner), 2, 2)));
}

struct Operands {
  float* d;
  const uint32_t* a;  // registers, or null
  uint64_t a_descriptor, b_descriptor;
  int accumulate;
};

inline emulator::Warpgroup& mine() {
  return emulator::block.warpgroups[emulator::running->linear / emulator::WARPGROUP];
}

// All 128 threads; work(in) runs once.
template <class In, class Work>
void together(const char* what, const In& in, Work work) {
  int nothing;
  emulator::meet(mine().meeting, emulator::running->linear % emulator::WARPGROUP,
                 emulator::WARPGROUP, what, in, nothing, [&](auto in, auto) { work(in); });
}

template <class T, int N>
void multiply(const std::vector<Operands>& lanes, bool trans_a, bool trans_b) {
  static float a[64][16], b[N][16];
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < N; n++) b[n][k] = value<T>(lanes[0].b_descriptor, trans_b, n, k);
    if (!lanes[0].a)
      for (int m = 0; m < 64; m++) a[m][k] = value<T>(lanes[0].a_descriptor, trans_a, m, k);
  }
  if (lanes[0].a)
    for (int warp = 0; warp < 4; warp++)
      unpack_a<T>([&](int lane) { return lanes[32 * warp + lane].a; },
                  *reinterpret_cast<float (*)[16][16]>(a[16 * warp]));
  for (int i = 0; i < emulator::WARPGROUP; i++)
    for (int r = 0; r < N / 2; r++) {
      const int row = i / 32 * 16 + i % 32 / 4 + 8 * (r >> 1 & 1),
                column = r / 4 * 8 + i % 4 * 2 + (r & 1);
      float sum = lanes[i].accumulate ? lanes[i].d[r] : 0.0f;
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
      lanes[i].d[r] = sum;
    }
}

inline void run(std::vector<emulator::Action>& works) {
  for (auto& work : works) work();
  works.clear();
}
// Does the work of all but `left` groups, in order.
inline void finish(emulator::Warpgroup& group, size_t left) {
  for (; group.groups.size() > left; group.groups.pop_front()) run(group.groups.front());
}

template <class T, int N>
void issue(const Operands& operands, bool trans_a, bool trans_b) {
  together("wgmma", operands, [&](auto in) {
    emulator::Warpgroup& group = mine();
    if (!group.fenced) emulator::fault("wgmma without a wgmma.fence before it");
    std::vector<Operands> lanes;
    for (int i = 0; i < emulator::WARPGROUP; i++) {
      lanes.push_back(in(i));
      if (in(i).a_descriptor != in(0).a_descriptor || in(i).b_descriptor != in(0).b_descriptor ||
          in(i).accumulate != in(0).accumulate)
        emulator::fault("wgmma with operands that differ among the warpgroup's threads");
    }
    auto work = [=] { multiply<T, N>(lanes, trans_a, trans_b); };
    group.open.push_back(work);
    if (!emulator::eager() && emulator::random() % 4 != 3) return;
    finish(group, 0);
    run(group.open);
  });
}

}  // namespace wgmma

inline void wgmma_fence() {
  wgmma::together("wgmma.fence", 0, [](auto) { wgmma::mine().fenced = true; });
}
inline void wgmma_commit() {
  wgmma::together("wgmma.commit_group", 0, [](auto) {
    emulator::Warpgroup& group = wgmma::mine();
    group.groups.push_back(std::move(group.open));
    group.open.clear();
    group.fenced = false;
  });
}
template <int N>
void wgmma_wait() {
  wgmma::together("wgmma.wait_group", 0, [](auto) { wgmma::finish(wgmma::mine(), N); });
}
template <int N>
void wgmma_hold(float (&)[N]) {}

template <class T, int N>
struct Wgmma {
  static_assert(N % 64 == 0 && N <= 256);
  template <int TRANS_A = 0, int TRANS_B = 0>
  static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    wgmma::issue<T, N>({d, nullptr, a, b, accumulate}, TRANS_A, TRANS_B);
  }
  template <int TRANS_B = 0>
  static void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    wgmma::issue<T, N>({d, a, 0, b, accumulate}, false, TRANS_B);
  }
};

}  // namespace fasttx
