#pragma once
#include "cuda/numbers.h"

namespace fasttx {

// The 16 x 16 operand of mma.sync and of wgmma from registers: element (row, k) of lane l's word w.
template <class T, class Words>
void unpack_a(Words words, float (&a)[16][16]) {
  for (int lane = 0; lane < 32; lane++)
    for (int w = 0; w < 4; w++) {
      const float2 v = T::unpack(words(lane)[w]);
      const int row = lane / 4 + 8 * (w & 1), k = lane % 4 * 2 + 8 * (w >> 1);
      a[row][k] = v.x;
      a[row][k + 1] = v.y;
    }
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    const uint32_t* a;
    uint32_t b[2];
    float d[4];
  } in = {a, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  struct Out {
    float d[4];
  } out;
  emulator::meet_warp("mma.sync", in, out, [](auto in, auto out) {
    float a[16][16], b[16][8];
    unpack_a<T>([&](int lane) { return in(lane).a; }, a);
    for (int lane = 0; lane < 32; lane++)
      for (int w = 0; w < 2; w++) {
        const float2 v = T::unpack(in(lane).b[w]);
        const int k = lane % 4 * 2 + 8 * w;
        b[k][lane / 4] = v.x;
        b[k + 1][lane / 4] = v.y;
      }
    float sum[16][8] = {};
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 16; k++)
        for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        out(lane).d[i] = in(lane).d[i] + sum[lane / 4 + 8 * (i >> 1)][lane % 4 * 2 + (i & 1)];
  });
  memcpy(d, out.d, sizeof d);
}

}  // namespace fasttx
