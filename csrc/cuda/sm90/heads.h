// Tiles of 16-bit tensors [B, H, S, D] in shared memory, by TMA for wgmma: slabs of 64 columns, one
// after the other, each ROWS rows of 128 bytes under the swizzle of 128 bytes. A slab begins at a
// multiple of 1024 bytes. What lies outside the tensor is zero.
#pragma once
#include "cuda/matrix_descriptor.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/tma.h"
#include "fasttx.h"

namespace fasttx {

constexpr int SLAB = 64;

struct HeadsMap {
  TensorMap map;
  int head_step, batch_step;  // 0 where heads, batches share their memory
};

// Why TMA cannot serve a tensor [B, H, S, D], or null.
inline const char* tma_refuses(const fasttx_tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.data) % 16) return "its memory is not aligned to 16 bytes";
  if (t.sizes[3] != 1 && t.strides[3] != 1) return "its last dimension is not contiguous";
  for (int i = 0; i < 3; i++)
    if (t.sizes[i] > 1 && t.strides[i] % 8) return "a stride is not a multiple of 16 bytes";
  if (t.sizes[2] > 1 && t.strides[2] == 0) return "its rows share their memory";
  for (int64_t size : t.sizes)
    if (size < 1 || size > INT32_MAX) return "a dimension is empty or too large";
  return nullptr;
}

// False where the driver refuses. rows: of a box of SLAB columns.
inline bool make_heads_map(HeadsMap* heads, const fasttx_tensor& t, uint32_t rows) {
  auto dense = [&](int i) { return t.sizes[i] > 1 && t.strides[i]; };
  auto size = [&](int i) { return dense(i) ? static_cast<uint64_t>(t.sizes[i]) : 1; };
  auto stride = [&](int i) { return dense(i) ? static_cast<uint64_t>(t.strides[i]) * 2 : 16; };
  const uint64_t sizes[] = {static_cast<uint64_t>(t.sizes[3]), size(2), size(1), size(0)};
  const uint64_t strides[] = {stride(2), stride(1), stride(0)};
  const uint32_t box[] = {SLAB, rows, 1, 1};
  heads->head_step = dense(1);
  heads->batch_step = dense(0);
  return make_tensor_map(&heads->map, t.dtype == FASTTX_BF16 ? Element::bf16 : Element::f16, 4,
                         t.data, sizes, strides, box, Swizzle::bytes128);
}

// ROWS x COLUMNS from `row` on: COLUMNS * ROWS * 2 bytes at the mbarrier, outside elements counted.
template <int ROWS, int COLUMNS>
FASTTX_DEVICE void load_heads(uint32_t to, const HeadsMap* from, uint32_t mbarrier, int row,
                              int head, int batch) {
#pragma unroll
  for (int c = 0; c < COLUMNS; c += SLAB)
    tma_load(to + c * ROWS * 2, &from->map, mbarrier, c, row, head * from->head_step,
             batch * from->batch_step);
}

// wgmma's operand from (row, column) on: its inner product runs along the columns ..
template <int ROWS>
FASTTX_DEVICE uint64_t along_columns(uint32_t tile, int row, int column) {
  return matrix_descriptor(
      tile + column / SLAB * (ROWS * 128) + row * 128 + column % SLAB * 2, Swizzle::bytes128, 1024);
}
// .. or, transposed, along the rows.
template <int ROWS>
FASTTX_DEVICE uint64_t along_rows(uint32_t tile, int row, int column) {
  return matrix_descriptor(tile + column / SLAB * (ROWS * 128) + row * 128, Swizzle::bytes128, 1024,
                           ROWS * 128);
}

// Where 8 columns from `column` (a multiple of 8) of a row are, for stmatrix and ordinary accesses.
template <int ROWS>
FASTTX_DEVICE uint32_t at_heads(int row, int column) {
  return column / SLAB * (ROWS * 128) + row * 128 + ((column % SLAB / 8 ^ (row & 7)) << 4);
}

// A ring of STAGES, a power of two, by one count: a consumer of number n waits for full[stage(n)]
// at phase(n), a producer for empty[stage(n)] at phase(n) ^ 1.
template <int STAGES>
struct Ring {
  static_assert((STAGES & (STAGES - 1)) == 0);
  static FASTTX_DEVICE int stage(uint32_t n) { return n % STAGES; }
  static FASTTX_DEVICE uint32_t phase(uint32_t n) { return n / STAGES & 1; }
};

}  // namespace fasttx
