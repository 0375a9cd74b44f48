#pragma once
#include "cuda/platform.h"

namespace fasttx {

namespace matrices {

// Cycles beyond one that the eight rows of each matrix need, from 32 banks of 4 bytes.
template <class Addresses>
void count_conflicts(int count, Addresses address) {
  for (int m = 0; m < count; m++) {
    int busiest = 0, uses[8] = {};
    for (int r = 0; r < 8; r++) busiest = std::max(busiest, ++uses[address(8 * m + r) / 16 % 8]);
    emulator::traffic.shared_conflicts += busiest - 1;
  }
}

template <int N>
struct Fragment {
  uint32_t r[N];
};

// The 16-bit halves of lane l's word of a matrix.
template <bool TRANS>
void place(int lane, int half, int& row, int& column) {
  row = lane / 4;
  column = lane % 4 * 2 + half;
  if (TRANS) std::swap(row, column);
}

template <int N, bool TRANS>
void load(uint32_t (&r)[N], uint32_t address, const char* what) {
  Fragment<N> result = {};
  emulator::meet_warp(what, address, result, [](auto in, auto out) {
    count_conflicts(N, in);
    for (int m = 0; m < N; m++)
      for (int lane = 0; lane < 32; lane++)
        for (int half = 0; half < 2; half++) {
          int row, column;
          place<TRANS>(lane, half, row, column);
          auto* p = static_cast<uint16_t*>(emulator::shared_pointer(in(8 * m + row), 16, 16));
          out(lane).r[m] |= uint32_t{p[column]} << 16 * half;
        }
  });
  memcpy(r, result.r, sizeof r);
}

template <bool TRANS>
void store4(uint32_t address, const uint32_t (&r)[4], const char* what) {
  struct In {
    uint32_t address, r[4];
  } in = {address, {r[0], r[1], r[2], r[3]}};
  int nothing;
  emulator::meet_warp(what, in, nothing, [](auto in, auto) {
    count_conflicts(4, [&](int i) { return in(i).address; });
    for (int m = 0; m < 4; m++)
      for (int lane = 0; lane < 32; lane++)
        for (int half = 0; half < 2; half++) {
          int row, column;
          place<TRANS>(lane, half, row, column);
          auto* p =
              static_cast<uint16_t*>(emulator::shared_pointer(in(8 * m + row).address, 16, 16));
          p[column] = static_cast<uint16_t>(in(lane).r[m] >> 16 * half);
        }
  });
}

}  // namespace matrices

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  matrices::load<4, false>(r, address, "ldmatrix.x4");
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  matrices::load<2, false>(r, address, "ldmatrix.x2");
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  matrices::load<4, true>(r, address, "ldmatrix.x4.trans");
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
  matrices::load<2, true>(r, address, "ldmatrix.x2.trans");
}
inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  matrices::store4<false>(address, r, "stmatrix.x4");
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  matrices::store4<true>(address, r, "stmatrix.x4.trans");
}

}  // namespace fasttx
