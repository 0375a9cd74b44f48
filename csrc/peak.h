// The arithmetic peak of one core, measured: a loop of nothing but multiply-adds in registers. What
// benchmarks divide by.
#pragma once
#include <stdint.h>

namespace fasttx {

#if defined(__x86_64__)

// `chains` independent sums, more than latency x ports and fewer than registers. In assembly, so
// that no compiler keeps them in memory. All zeros: speed does not depend on the values.
#define FASTTX_PEAK_LOOP(zero, step, chains)                                                 \
  asm volatile(                                                                              \
      ".irp r," chains ",14,15\n\t" zero "\n\t.endr\n"                                       \
      "1:\n\t.irp r," chains "\n\t" step "\n\t.endr\n\t"                                     \
      "dec %0\n\tjnz 1b\n\tvzeroupper"                                                       \
      : "+r"(rounds)                                                                         \
      :                                                                                      \
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
        "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15" FASTTX_PEAK_MORE)

#define FASTTX_PEAK_MORE
__attribute__((target("avx2,fma"), noinline)) inline void peak_avx2(int64_t rounds) {
  FASTTX_PEAK_LOOP("vxorps %%ymm\\r, %%ymm\\r, %%ymm\\r", "vfmadd231ps %%ymm14, %%ymm15, %%ymm\\r",
                   "0,1,2,3,4,5,6,7,8,9,10,11");
}
#undef FASTTX_PEAK_MORE

#define FASTTX_PEAK_MORE                                                                     \
  , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25"
#define FASTTX_PEAK_24 "0,1,2,3,4,5,6,7,8,9,10,11,12,13,16,17,18,19,20,21,22,23,24,25"
__attribute__((target("avx512f"), noinline)) inline void peak_avx512(int64_t rounds) {
  FASTTX_PEAK_LOOP("vpxord %%zmm\\r, %%zmm\\r, %%zmm\\r", "vfmadd231ps %%zmm14, %%zmm15, %%zmm\\r",
                   FASTTX_PEAK_24);
}
__attribute__((target("avx512f"), noinline)) inline void peak_dpbf16(int64_t rounds) {
  FASTTX_PEAK_LOOP("vpxord %%zmm\\r, %%zmm\\r, %%zmm\\r", "vdpbf16ps %%zmm14, %%zmm15, %%zmm\\r",
                   FASTTX_PEAK_24);
}
#undef FASTTX_PEAK_24
#undef FASTTX_PEAK_MORE
#undef FASTTX_PEAK_LOOP

// Runs `rounds` rounds and returns the floating-point operations done, 0 where the CPU has no such
// instruction: vdpbf16ps for bf16, otherwise the widest fp32 multiply-add.
inline double peak(bool bf16, int64_t rounds) {
  __builtin_cpu_init();
  if (rounds < 1) return 0;
  if (bf16) {
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
    peak_dpbf16(rounds);
    return 24.0 * 64 * (double)rounds;
  }
  if (__builtin_cpu_supports("avx512f")) {
    peak_avx512(rounds);
    return 24.0 * 32 * (double)rounds;
  }
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  peak_avx2(rounds);
  return 12.0 * 16 * (double)rounds;
}

#else

inline double peak(bool, int64_t) { return 0; }

#endif

}  // namespace fasttx
