// Eight neighbouring columns of a 16-bit tensor [M, N], by 16 bytes where its rows allow.
#pragma once
#include "cuda/eight.h"
#include "cuda/gemm.h"

namespace fasttx {

// Zeros beyond the first `live`.
template <class T>
FASTTX_DEVICE void load_panel(const Panel& p, int64_t m, int64_t n, int live, float (&v)[8]) {
  const T* at = static_cast<const T*>(p.data) + m * p.row + n * p.column;
  if (p.by_eight && live == 8) {
    unpack8<T>(load16(at), v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = i < live ? to_float(load(at + i * p.column)) : 0.0f;
}

template <class T>
FASTTX_DEVICE void store_panel(const Panel& p, int64_t m, int64_t n, int live,
                               const float (&v)[8]) {
  T* at = static_cast<T*>(p.data) + m * p.row + n * p.column;
  if (p.by_eight && live == 8) {
    store16(at, pack8<T>(v));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < live) store(at + i * p.column, from_float<T>(v[i]));
}

}  // namespace fasttx
