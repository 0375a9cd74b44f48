// A warpgroup's accumulators, 64 rows by COLUMNS, to a 16-bit tensor of any strides.
#pragma once
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/memory.h"
#include "cuda/sm90/heads.h"
#include "cuda/tile/band.h"

namespace fasttx {

// Rows from `first` on, of which `rows` exist, and `columns` of a head's columns from `column` on.
// place: 64 * COLUMNS * 2 bytes of shared memory, aligned to 1024; barrier: one of the warpgroup's
// own.
template <class T, int N>
FASTTX_DEVICE void store_tile(const fasttx_tensor& t, int batch, int head, int first, int rows,
                              int columns, const float (&d)[N], float scale, unsigned char* place,
                              int barrier, int column = 0) {
  constexpr int COLUMNS = N * 2;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const uint32_t to = shared_address(place);
  barrier_sync(barrier, 128);
#pragma unroll
  for (int k = 0; k < COLUMNS / 16; k++) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      words[i] = T::pack(d[8 * k + 2 * i] * scale, d[8 * k + 2 * i + 1] * scale);
    stmatrix_x4(to + at_heads<64>(16 * warp + lane % 16, 16 * k + lane / 16 * 8), words);
  }
  barrier_sync(barrier, 128);
  T* data = static_cast<T*>(t.data) + rows_of(t, batch, head, first) + column * t.strides[3];
  bool even = t.strides[3] == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
#pragma unroll
  for (int i = 0; i < 3; i++) even &= t.strides[i] % 8 == 0;
  for (int i = thread; i < 64 * COLUMNS / 8; i += 128) {
    const int r = i / (COLUMNS / 8), from = i % (COLUMNS / 8) * 8;
    if (r >= rows || from >= columns) continue;
    const Words words = *reinterpret_cast<const Words*>(place + at_heads<64>(r, from));
    T* row = data + r * t.strides[2];
    if (even && from + 8 <= columns) {
      store16(row + from, words);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (from + e < columns)
        store(row + (from + e) * t.strides[3],
              T{static_cast<uint16_t>(words.w[e / 2] >> e % 2 * 16)});
  }
}

}  // namespace fasttx
