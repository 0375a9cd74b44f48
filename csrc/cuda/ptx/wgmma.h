// wgmma (sm_90a): d [64, N] (+)= a [64, 16] b [16, N], 16-bit numbers into fp32, asynchronously, by a
// warpgroup of 128 threads. Thread 32 w + 4 g + t holds, of the columns 8 j .. 8 j + 7, d[4 j ..] =
// row 16 w + g columns 2 t, 2 t + 1, then row 16 w + g + 8 the same columns; a in registers is laid
// out as in mma.sync.
#pragma once
#include "cuda/matrix_descriptor.h"
#include "cuda/numbers.h"

namespace fasttx {

// Before the first wgmma, and before one that uses registers written since the last.
FASTTX_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTTX_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups of the warpgroup are under way.
template <int N>
FASTTX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// Keeps the compiler from moving uses of these registers across the wait before it.
template <int N>
FASTTX_DEVICE void wgmma_hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// accumulate == 0: d is overwritten. TRANS: the operand is MN-major.
template <class T, int N>
struct Wgmma;

// clang-format off
#define FASTTX_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTTX_R1 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTTX_R2 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTTX_R3 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTTX_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTTX_D16(i) FASTTX_D4(i), FASTTX_D4(i + 4), FASTTX_D4(i + 8), FASTTX_D4(i + 12)
#define FASTTX_D32(i) FASTTX_D16(i), FASTTX_D16(i + 16)
#define FASTTX_WGMMA(T, TYPES, N, REGISTERS, OUTPUTS, A, B, ACCUMULATE, TRANS_A, TRANS_B, A0, A1, A2, A3, RB, RACC, RTRANS) \
  template <>                                                                                     \
  struct Wgmma<T, N> {                                                                            \
    template <int TRANS_A_ = 0, int TRANS_B_ = 0>                                                 \
    static FASTTX_DEVICE void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ACCUMULATE ", 0;\n"                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES                        \
                   " {" REGISTERS "}, %" A ", %" B ", p, 1, 1, %" TRANS_A ", %" TRANS_B ";\n}"    \
                   : OUTPUTS                                                                      \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(TRANS_A_), "n"(TRANS_B_) : "memory");   \
    }                                                                                             \
    template <int TRANS_B_ = 0>                                                                   \
    static FASTTX_DEVICE void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,           \
                                 int accumulate) {                                                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" RACC ", 0;\n"                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES                        \
                   " {" REGISTERS "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" RB                 \
                   ", p, 1, 1, %" RTRANS ";\n}"                                                   \
                   : OUTPUTS                                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),         \
                     "n"(TRANS_B_) : "memory");                                                   \
    }                                                                                             \
  };
#define FASTTX_WGMMA_64(T, TYPES) \
  FASTTX_WGMMA(T, TYPES, 64, FASTTX_R0, FASTTX_OUTPUTS_64, "32", "33", "34", "35", "36", "32", "33", "34", "35", "36", "37", "38")
#define FASTTX_OUTPUTS_64 FASTTX_D32(0)
FASTTX_WGMMA_64(bf16, "bf16.bf16")
FASTTX_WGMMA_64(f16, "f16.f16")
#define FASTTX_WGMMA_128(T, TYPES) \
  FASTTX_WGMMA(T, TYPES, 128, FASTTX_R0 ", " FASTTX_R1, FASTTX_OUTPUTS_128, "64", "65", "66", "67", "68", "64", "65", "66", "67", "68", "69", "70")
#define FASTTX_OUTPUTS_128 FASTTX_D32(0), FASTTX_D32(32)
FASTTX_WGMMA_128(bf16, "bf16.bf16")
FASTTX_WGMMA_128(f16, "f16.f16")
#define FASTTX_WGMMA_192(T, TYPES) \
  FASTTX_WGMMA(T, TYPES, 192, FASTTX_R0 ", " FASTTX_R1 ", " FASTTX_R2, FASTTX_OUTPUTS_192, "96", "97", "98", "99", "100", "96", "97", "98", "99", "100", "101", "102")
#define FASTTX_OUTPUTS_192 FASTTX_D32(0), FASTTX_D32(32), FASTTX_D32(64)
FASTTX_WGMMA_192(bf16, "bf16.bf16")
FASTTX_WGMMA_192(f16, "f16.f16")
#define FASTTX_WGMMA_256(T, TYPES) \
  FASTTX_WGMMA(T, TYPES, 256, FASTTX_R0 ", " FASTTX_R1 ", " FASTTX_R2 ", " FASTTX_R3, FASTTX_OUTPUTS_256, "128", "129", "130", "131", "132", "128", "129", "130", "131", "132", "133", "134")
#define FASTTX_OUTPUTS_256 FASTTX_D32(0), FASTTX_D32(32), FASTTX_D32(64), FASTTX_D32(96)
FASTTX_WGMMA_256(bf16, "bf16.bf16")
FASTTX_WGMMA_256(f16, "f16.f16")
#undef FASTTX_R0
#undef FASTTX_R1
#undef FASTTX_R2
#undef FASTTX_R3
#undef FASTTX_D4
#undef FASTTX_D16
#undef FASTTX_D32
#undef FASTTX_WGMMA
#undef FASTTX_WGMMA_64
#undef FASTTX_OUTPUTS_64
#undef FASTTX_WGMMA_128
#undef FASTTX_OUTPUTS_128
#undef FASTTX_WGMMA_192
#undef FASTTX_OUTPUTS_192
#undef FASTTX_WGMMA_256
#undef FASTTX_OUTPUTS_256
// clang-format on

}  // namespace fasttx
