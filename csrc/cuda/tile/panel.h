// Eight neighbouring columns of a 16-bit tensor [M, N], by 16 bytes where its rows allow.
#pragma once
#include "cuda/eight.h"
#include "cuda/gemm.h"

namespace fasttx {

// Zeros beyond the first `live`.
FASTTX_DEVICE void load_panel(const Panel& p, int dtype, int64_t m, int64_t n, int live,
                              float (&v)[8]) {
  const auto* at = static_cast<const uint16_t*>(p.data) + m * p.row + n * p.column;
  if (p.by_eight && live == 8) {
    unpack8(load16(at), dtype, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = i < live ? load1(at, dtype, i * p.column) : 0.0f;
}

FASTTX_DEVICE void store_panel(const Panel& p, int dtype, int64_t m, int64_t n, int live,
                               const float (&v)[8]) {
  auto* at = static_cast<uint16_t*>(p.data) + m * p.row + n * p.column;
  if (p.by_eight && live == 8) {
    store16(at, pack8(v, dtype));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < live) store1(at, dtype, i * p.column, v[i]);
}

}  // namespace fasttx
