// What the attention kernels for mma.sync share: tiles of 16-bit rows in shared memory, operands
// from them, and products of a warp's rows with them.
//
// Chunk c (16 bytes) of row r lies at chunk c ^ (r & 7) of the row, so that the eight rows which
// ldmatrix reads at once lie in different banks.
#pragma once
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/tile/careful.h"
#include "cuda/tile/keep.h"

namespace fasttx {

template <int COLUMNS>
FASTTX_DEVICE uint32_t swizzled(int row, int column) {
  return row * (COLUMNS * 2) + ((column / 8 ^ (row & 7)) << 4);
}

// What the compiler computes from an address it computes anew where it needs it, instead of keeping
// it in registers through a loop.
template <class Address>
FASTTX_DEVICE Address opaque(Address address) {
  if constexpr (sizeof(Address) == 8)
    asm volatile("" : "+l"(address));
  else
    asm volatile("" : "+r"(address));
  return address;
}

// Rows first .. first + ROWS - 1 of a matrix `width` wide, by all THREADS; zero beyond it and
// beyond row `limit`.
template <int ROWS, int COLUMNS, int THREADS, class T>
FASTTX_DEVICE void fetch(uint32_t to, const T* from, int64_t stride, int first, int limit,
                         int width, int thread) {
  constexpr int CHUNKS = COLUMNS / 8, STEP = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0 && STEP % 4 == 0);
  const int row = thread / CHUNKS, column = thread % CHUNKS * 8;
  const int64_t step = opaque(STEP * stride);
  const int rows = column < width ? limit - first - row : 0;
  const T* source = from + (first + row) * stride + column;
  to += swizzled<COLUMNS>(row, column);
#pragma unroll
  for (int r = 0; r < ROWS; r += STEP) {
    // Four rows on, the third bit of the chunk flips.
    cp_async16((to ^ r / 4 % 2 * 64) + r * (COLUMNS * 2), r < rows ? source : from, r < rows);
    source += step;
  }
}

// The left operand from a warp's own fp32 tile d[n][4]: columns 16 k .. 16 k + 15.
template <class T, int N>
FASTTX_DEVICE void left_operand(uint32_t (&a)[4], const float (&d)[N][4], int k) {
  a[0] = T::pack(d[2 * k][0], d[2 * k][1]);
  a[1] = T::pack(d[2 * k][2], d[2 * k][3]);
  a[2] = T::pack(d[2 * k + 1][0], d[2 * k + 1][1]);
  a[3] = T::pack(d[2 * k + 1][2], d[2 * k + 1][3]);
}

// d[m][n] += own rows (row0 + 16 m ..) times the rows of `other`, along the columns of both.
// Sixteen columns on, an address differs by an exclusive or.
template <class T, int COLUMNS, int M, int N>
FASTTX_DEVICE void multiply_rows(float (&d)[M][N][4], uint32_t own, int row0, uint32_t other) {
  const int lane = opaque(threadIdx.x) % 32;
  const uint32_t left = opaque(own + swizzled<COLUMNS>(row0 + lane % 16, lane / 16 * 8));
  const uint32_t right =
      opaque(other + swizzled<COLUMNS>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
#pragma unroll
  for (int k = 0; k < COLUMNS; k += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) ldmatrix_x4(a[m], (left ^ k * 2) + m * 16 * COLUMNS * 2);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, (right ^ k * 2) + n * 8 * COLUMNS * 2);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(d[m][n], a[m], b[0], b[1]);
        mma<T>(d[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// d[m][n] += p[m] (a warp's rows by 8 K columns, fp32) times the tile `other` of 8 K rows.
template <class T, int COLUMNS, int M, int K, int N>
FASTTX_DEVICE void multiply_weights(float (&d)[M][N][4], const float (&p)[M][K][4],
                                    uint32_t other) {
  static_assert(N == COLUMNS / 8);
  const int lane = opaque(threadIdx.x) % 32;
  const uint32_t right = opaque(other + swizzled<COLUMNS>(lane % 16, lane / 16 * 8));
#pragma unroll
  for (int k = 0; k < K / 2; k++) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) left_operand<T>(a[m], p[m], k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, (right ^ n * 16) + k * 16 * COLUMNS * 2);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(d[m][n], a[m], b[0], b[1]);
        mma<T>(d[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The maximum and the sum over the four lanes that share a row.
FASTTX_DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
FASTTX_DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <int M, int N>
FASTTX_DEVICE bool all_finite(const float (&d)[M][N][4]) {
  float sum = 0.0f;  // of zeros, NaN where one is not finite
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum += d[m][n][e] * 0.0f;
  return sum == 0.0f;
}

// A warp's rows d * factor[m][h] to rows row0 .. of `to`, by way of the warp's own rows of a tile
// that nothing else uses; rows from `limit` on are left out. strides: of rows and of columns.
template <class T, int COLUMNS, int M, int N>
FASTTX_DEVICE void write_rows(unsigned char* tile, int own, const float (&d)[M][N][4],
                              const float (&factor)[M][2], T* to, int64_t stride,
                              int64_t column_stride, int row0, int limit, int width) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        *reinterpret_cast<uint32_t*>(
            tile + swizzled<COLUMNS>(own + 16 * m + 8 * h + g, 8 * n) + 4 * t) =
            T::pack(d[m][n][2 * h] * factor[m][h], d[m][n][2 * h + 1] * factor[m][h]);
  __syncwarp();
  const bool by_eight = column_stride == 1 && stride % 8 == 0 && width % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(to) % 16 == 0;
  constexpr int CHUNKS = COLUMNS / 8;
#pragma unroll 4
  for (int i = lane; i < 16 * M * CHUNKS; i += 32) {
    const int r = i / CHUNKS, column = i % CHUNKS * 8;
    if (row0 + r >= limit || column >= width) continue;
    const unsigned char* from = tile + swizzled<COLUMNS>(own + r, column);
    T* at = to + (row0 + r) * stride + column * column_stride;
    if (by_eight) {
      store16(at, *reinterpret_cast<const Words*>(from));
    } else {
      const T* eight = reinterpret_cast<const T*>(from);
      for (int c = 0; c < 8 && column + c < width; c++) store(at + c * column_stride, eight[c]);
    }
  }
  __syncwarp();
}

}  // namespace fasttx
