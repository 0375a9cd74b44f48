// The arithmetic peak of one core, measured: a loop of nothing but multiply-adds in registers. What
// benchmarks divide by.
#pragma once
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fasttx {

#if defined(__x86_64__)

// Chains are independent: more than latency x ports, fewer than registers.
#define FASTTX_PEAK(name, isa, vector, chains, zero, step)                    \
  __attribute__((target(isa), noinline)) static float name(int64_t rounds) {  \
    vector sum[chains];                                                       \
    _Pragma("GCC unroll 32") for (int i = 0; i < chains; i++) sum[i] = zero;  \
    for (int64_t r = 0; r < rounds; r++) {                                    \
      _Pragma("GCC unroll 32") for (int i = 0; i < chains; i++) {             \
        step;                                                                 \
        asm volatile("" : "+v"(sum[i]));                                      \
      }                                                                       \
    }                                                                         \
    float total = 0;                                                          \
    for (int i = 0; i < chains; i++) total += sum[i][0];                      \
    return total;                                                             \
  }

FASTTX_PEAK(peak_avx2, "avx2,fma", __m256, 12, _mm256_setzero_ps(),
            sum[i] = _mm256_fmadd_ps(_mm256_set1_ps(0.5f), sum[i], _mm256_set1_ps(1.0f)))
FASTTX_PEAK(peak_avx512, "avx512f", __m512, 24, _mm512_setzero_ps(),
            sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(0.5f), sum[i], _mm512_set1_ps(1.0f)))
FASTTX_PEAK(peak_dpbf16, "avx512f,avx512bf16", __m512, 24, _mm512_setzero_ps(),
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_set1_epi32(0x3c003c00),
                                      (__m512bh)_mm512_set1_epi32(0x3c003c00)))
#undef FASTTX_PEAK

// Runs `rounds` rounds and returns the floating-point operations done, 0 where the CPU has no such
// instruction: vdpbf16ps for bf16, otherwise the widest fp32 multiply-add.
inline double peak(bool bf16, int64_t rounds) {
  __builtin_cpu_init();
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
