// mma.sync m16n8k16: d += a b with a [16, 16] by rows, b [16, 8] by columns, d fp32. Lane l = 4 g +
// t holds d[g][2t], d[g][2t + 1], d[g + 8][2t], d[g + 8][2t + 1]; a's words are rows g, g + 8, g, g
// + 8 at columns 2t, 2t, 2t + 8, 2t + 8; b's are rows 2t and 2t + 8 of column g.
#pragma once
#include "cuda/numbers.h"

namespace fasttx {

template <class T>
FASTTX_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (T::is_bf16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fasttx
