// A vector of W floats over GCC vector extensions. The kernels are written once on top of it and
// built once per instruction set: W = 4 (baseline), 8 (AVX2 + FMA + F16C), 16 (AVX-512).
// Everything here has internal linkage: an inline function with external linkage would let the
// linker hand one instruction set's copy to another.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <immintrin.h>

#ifndef FASTTX_ISA
#error "compile with -DFASTTX_ISA=isa_<default|avx2|avx512|avx512bf16>"
#endif
#define FASTTX_INLINE inline __attribute__((always_inline))
#define FASTTX_NOINLINE __attribute__((noinline))
#define FASTTX_PRAGMA(x) _Pragma(#x)
#define FASTTX_UNROLL(n) FASTTX_PRAGMA(GCC unroll n)

namespace fasttx::FASTTX_ISA {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FASTTX_AVX512 1
#define FASTTX_AVX2 0
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FASTTX_AVX512 0
#define FASTTX_AVX2 1
constexpr int W = 8;
#else
#define FASTTX_AVX512 0
#define FASTTX_AVX2 0
constexpr int W = 4;
#endif

#if defined(__AVX512BF16__)
constexpr bool has_dpbf16 = true;
#else
constexpr bool has_dpbf16 = false;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * W), aligned(1), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr float INF = __builtin_inff();
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;
constexpr float LN2_LOW = -1.904654299957768e-9f;  // ln 2 - LN2

FASTTX_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTTX_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FASTTX_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

FASTTX_INLINE vf set1(float x) { return x - vf{}; }
FASTTX_INLINE vi set1i(int32_t x) { return x - vi{}; }
FASTTX_INLINE vi as_int(vf x) { return (vi)x; }
FASTTX_INLINE vf as_float(vi x) { return (vf)x; }

FASTTX_INLINE vf load(const float* p) { return *(const vf_any*)p; }
FASTTX_INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
FASTTX_INLINE vi load_int(const void* p) { return *(const vi_any*)p; }
FASTTX_INLINE void store_int(void* p, vi x) { *(vi_any*)p = x; }
FASTTX_INLINE vf broadcast(const float* p) { return set1(*p); }
// One bf16 pair (32 bits) in every lane.
FASTTX_INLINE vi broadcast_pair(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return set1i(x);
}

// 0, 1, 2, ... W-1
FASTTX_INLINE vi lane_index() {
  vi r;
  for (int i = 0; i < W; i++) r[i] = i;
  return r;
}

#if FASTTX_AVX512
FASTTX_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FASTTX_INLINE vf fms(vf a, vf b, vf c) { return (vf)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c); }
// a * b + c rounded once; -(a * b) + c.
FASTTX_INLINE vf fnma(vf a, vf b, vf c) { return (vf)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// The second operand when either is NaN, as the instruction does.
FASTTX_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FASTTX_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
typedef __mmask16 vmask;
FASTTX_INLINE vmask less(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
FASTTX_INLINE vmask equal(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
FASTTX_INLINE vmask less(vi a, vi b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
FASTTX_INLINE vmask equal(vi a, vi b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
FASTTX_INLINE vmask mask_and(vmask a, vmask b) { return a & b; }
FASTTX_INLINE vmask mask_or(vmask a, vmask b) { return a | b; }
FASTTX_INLINE vmask mask_not(vmask a) { return ~a; }
FASTTX_INLINE bool any(vmask m) { return m != 0; }
FASTTX_INLINE vf select(vmask m, vf a, vf b) { return (vf)_mm512_mask_mov_ps((__m512)b, m, (__m512)a); }
FASTTX_INLINE vi select(vmask m, vi a, vi b) { return (vi)_mm512_mask_mov_epi32((__m512i)b, m, (__m512i)a); }
FASTTX_INLINE vf zero_unless(vmask m, vf a) { return (vf)_mm512_maskz_mov_ps(m, (__m512)a); }
#elif FASTTX_AVX2
FASTTX_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FASTTX_INLINE vf fms(vf a, vf b, vf c) { return (vf)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c); }
FASTTX_INLINE vf fnma(vf a, vf b, vf c) { return (vf)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FASTTX_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FASTTX_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
FASTTX_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
FASTTX_INLINE vf fms(vf a, vf b, vf c) { return a * b - c; }
FASTTX_INLINE vf fnma(vf a, vf b, vf c) { return c - a * b; }
FASTTX_INLINE vf max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
FASTTX_INLINE vf min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#endif

#if !FASTTX_AVX512
// A mask is all ones or all zeros in every lane.
typedef vi vmask;
FASTTX_INLINE vmask less(vf a, vf b) { return a < b; }
FASTTX_INLINE vmask equal(vf a, vf b) { return a == b; }
FASTTX_INLINE vmask less(vi a, vi b) { return a < b; }
FASTTX_INLINE vmask equal(vi a, vi b) { return a == b; }
FASTTX_INLINE vmask mask_and(vmask a, vmask b) { return a & b; }
FASTTX_INLINE vmask mask_or(vmask a, vmask b) { return a | b; }
FASTTX_INLINE vmask mask_not(vmask a) { return ~a; }
FASTTX_INLINE bool any(vmask m) {
#if FASTTX_AVX2
  return _mm256_movemask_ps((__m256)m) != 0;
#else
  return _mm_movemask_ps((__m128)m) != 0;
#endif
}
FASTTX_INLINE vf select(vmask m, vf a, vf b) {
#if FASTTX_AVX2
  return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)m);
#else
  return (vf)((m & (vi)a) | (~m & (vi)b));
#endif
}
FASTTX_INLINE vi select(vmask m, vi a, vi b) { return (m & a) | (~m & b); }
FASTTX_INLINE vf zero_unless(vmask m, vf a) { return (vf)(m & (vi)a); }
#endif

FASTTX_INLINE vi max(vi a, vi b) { return a > b ? a : b; }
FASTTX_INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
// True where x is NaN or infinite.
FASTTX_INLINE vmask not_finite(vf x) { return less(set1i(0x7f7fffff), (vi)x & 0x7fffffff); }

FASTTX_INLINE float hsum(vf x) {
  float s[W];
  store(s, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) s[i] += s[i + n];
  return s[0];
}
FASTTX_INLINE float hmax(vf x) {
  float s[W];
  store(s, x);
  for (int i = 1; i < W; i++) s[0] = s[i] > s[0] ? s[i] : s[0];
  return s[0];
}

// ---- 16-bit floats: every conversion to 16 bits rounds to nearest even and keeps NaN ----

FASTTX_INLINE float to_float(float x) { return x; }
FASTTX_INLINE float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
FASTTX_INLINE float to_float(f16 x) {
#if FASTTX_AVX512 || FASTTX_AVX2
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t u = (magnitude << 13) + 0x38000000;
  float f;
  if (magnitude >= 0x7c00) {
    u += 0x38000000;
    __builtin_memcpy(&f, &u, 4);
  } else if (magnitude < 0x0400) {
    f = (float)magnitude * 5.9604644775390625e-8f;
  } else {
    __builtin_memcpy(&f, &u, 4);
  }
  __builtin_memcpy(&u, &f, 4);
  u |= sign;
  __builtin_memcpy(&f, &u, 4);
  return f;
#endif
}

FASTTX_INLINE void from_float(float x, float* y) { *y = x; }
FASTTX_INLINE void from_float(float x, bf16* y) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  y->bits = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
FASTTX_INLINE void from_float(float x, f16* y) {
#if FASTTX_AVX512 || FASTTX_AVX2
  y->bits = _cvtss_sh(x, 0);
#else
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    y->bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    y->bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000) {
    float f;
    __builtin_memcpy(&f, &magnitude, 4);
    f += 0.5f;  // the sum's last bit is the smallest fp16 step: the addition rounds
    __builtin_memcpy(&u, &f, 4);
    y->bits = sign | (u - 0x3f000000);
  } else {
    y->bits = sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
  }
#endif
}

#if FASTTX_AVX512
FASTTX_INLINE vf load(const bf16* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
FASTTX_INLINE vf load(const f16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
// Not vcvtneps2bf16, which flushes subnormals.
FASTTX_INLINE __m256i round_bf16(vf x) {
  const vu u = (vu)x;
  const __m512i rounded = (__m512i)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  const __m512i quiet = (__m512i)((u >> 16) | 0x40);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q), quiet));
}
FASTTX_INLINE void store(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, round_bf16(x)); }
FASTTX_INLINE void store(f16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0));
}
FASTTX_INLINE __mmask16 first_lanes(int n) { return n >= 16 ? 0xffff : (1u << n) - 1; }
FASTTX_INLINE vf load_partial(const float* p, int n) {
  return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
FASTTX_INLINE vf load_partial(const bf16* p, int n) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16);
}
FASTTX_INLINE vf load_partial(const f16* p, int n) {
  return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FASTTX_INLINE void store_partial(float* p, vf x, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
}
FASTTX_INLINE void store_partial(bf16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), round_bf16(x));
}
FASTTX_INLINE void store_partial(f16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph((__m512)x, 0));
}
#else
#if FASTTX_AVX2
FASTTX_INLINE vf load(const bf16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
FASTTX_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FASTTX_INLINE void store(bf16* p, vf x) {
  const vu u = (vu)x;
  const vi nan = x != x;
  const vi r = (vi)((u + 0x7fff + ((u >> 16) & 1)) >> 16), quiet = (vi)((u >> 16) | 0x40);
  const __m256i all = (__m256i)((nan & quiet) | (~nan & r));
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
FASTTX_INLINE void store(f16* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
#else
FASTTX_INLINE vf load(const bf16* p) {
  const __m128i h = _mm_loadl_epi64((const __m128i*)p);
  return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), h);
}
FASTTX_INLINE vf load(const f16* p) {
  vf r;
  for (int i = 0; i < W; i++) r[i] = to_float(p[i]);
  return r;
}
FASTTX_INLINE void store(bf16* p, vf x) {
  for (int i = 0; i < W; i++) from_float(x[i], p + i);
}
FASTTX_INLINE void store(f16* p, vf x) {
  for (int i = 0; i < W; i++) from_float(x[i], p + i);
}
#endif
template <class T>
FASTTX_INLINE vf load_partial(const T* p, int n) {
  float t[W] = {};
  for (int i = 0; i < n && i < W; i++) t[i] = to_float(p[i]);
  return load(t);
}
template <class T>
FASTTX_INLINE void store_partial(T* p, vf x, int n) {
  float t[W];
  store(t, x);
  for (int i = 0; i < n && i < W; i++) from_float(t[i], p + i);
}
#endif

// Element i at p + i * stride, i < n, zeros after: any stride.
template <class T>
FASTTX_INLINE vf load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n >= W ? load(p) : load_partial(p, n);
  float t[W] = {};
  for (int i = 0; i < n && i < W; i++) t[i] = to_float(p[i * stride]);
  return load(t);
}
template <class T>
FASTTX_INLINE void store_strided(T* p, int64_t stride, vf x, int n) {
  if (stride == 1) {
    if (n >= W) store(p, x);
    else store_partial(p, x, n);
    return;
  }
  float t[W];
  store(t, x);
  for (int i = 0; i < n && i < W; i++) from_float(t[i], p + i * stride);
}

// Two rows of probabilities or gradients as bf16 pairs: low half from a, high half from b. Rounds
// half away from zero; for finite values below the largest bf16 only.
FASTTX_INLINE vi pack_pair(vf a, vf b) {
  const vu x = (vu)a + 0x8000, y = (vu)b + 0x8000;
#if FASTTX_AVX512
  return (vi)_mm512_ternarylogic_epi32((__m512i)(x >> 16), _mm512_set1_epi32(0xffff0000), (__m512i)y, 0xF8);
#else
  return (vi)((x >> 16) | (y & 0xffff0000));
#endif
}
// The same rounded to nearest even; finite values only. vcvtne2ps2bf16 takes subnormals for 0.
FASTTX_INLINE vi round_pair(vf a, vf b) {
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  const __m512i order = _mm512_add_epi32((__m512i)(lane_index() * 0x10001), _mm512_set1_epi32(0x100000));
  return (vi)_mm512_permutexvar_epi16(order, halves);
#else
  const vu x = (vu)a + 0x7fff + (((vu)a >> 16) & 1), y = (vu)b + 0x7fff + (((vu)b >> 16) & 1);
  return (vi)((x >> 16) | (y & 0xffff0000));
#endif
}
FASTTX_INLINE vf pair_low(vi p) { return (vf)((vu)p << 16); }
FASTTX_INLINE vf pair_high(vi p) { return (vf)((vu)p & 0xffff0000); }

// c + a.low * b.low + a.high * b.high of bf16 pairs.
#if defined(__AVX512BF16__)
FASTTX_INLINE vf dpbf16(vf c, vi a, vi b) {
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}
#else
FASTTX_INLINE vf dpbf16(vf c, vi a, vi b) {
  return fma(pair_high(a), pair_high(b), fma(pair_low(a), pair_low(b), c));
}
#endif

// ---- transposes of W x W 32-bit elements ----

#if FASTTX_AVX512
FASTTX_INLINE void transpose(vi* v) {
  __m512i r[16], t[16];
  FASTTX_UNROLL(16)
  for (int i = 0; i < 16; i++) r[i] = (__m512i)v[i];
  FASTTX_UNROLL(8)
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  FASTTX_UNROLL(4)
  for (int i = 0; i < 4; i++) {
    r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  FASTTX_UNROLL(4)
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  FASTTX_UNROLL(4)
  for (int i = 0; i < 4; i++) {
    v[i] = (vi)_mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = (vi)_mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    v[4 + i] = (vi)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[12 + i] = (vi)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#elif FASTTX_AVX2
FASTTX_INLINE void transpose(vi* v) {
  __m256i r[8], t[8];
  FASTTX_UNROLL(4)
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32((__m256i)v[2 * i], (__m256i)v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)v[2 * i], (__m256i)v[2 * i + 1]);
  }
  FASTTX_UNROLL(2)
  for (int i = 0; i < 2; i++) {
    r[4 * i + 0] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  FASTTX_UNROLL(4)
  for (int i = 0; i < 4; i++) {
    v[i] = (vi)_mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    v[4 + i] = (vi)_mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
}
#else
FASTTX_INLINE void transpose(vi* v) {
  const __m128i a = _mm_unpacklo_epi32((__m128i)v[0], (__m128i)v[1]), b = _mm_unpackhi_epi32((__m128i)v[0], (__m128i)v[1]);
  const __m128i c = _mm_unpacklo_epi32((__m128i)v[2], (__m128i)v[3]), d = _mm_unpackhi_epi32((__m128i)v[2], (__m128i)v[3]);
  v[0] = (vi)_mm_unpacklo_epi64(a, c);
  v[1] = (vi)_mm_unpackhi_epi64(a, c);
  v[2] = (vi)_mm_unpacklo_epi64(b, d);
  v[3] = (vi)_mm_unpackhi_epi64(b, d);
}
#endif
FASTTX_INLINE void transpose(vf* v) {
  vi t[W];
  FASTTX_UNROLL(16)
  for (int i = 0; i < W; i++) t[i] = (vi)v[i];
  transpose(t);
  FASTTX_UNROLL(16)
  for (int i = 0; i < W; i++) v[i] = (vf)t[i];
}

// Lane j, j < COUNT: the sum of the lanes of c[j]. COUNT is a power of two up to W; c is used up.
#if FASTTX_AVX512
template <int DISTANCE>
FASTTX_INLINE __m512 exchange(__m512 x) {
  if constexpr (DISTANCE == 1) return _mm512_permute_ps(x, 0xb1);
  else if constexpr (DISTANCE == 2) return _mm512_permute_ps(x, 0x4e);
  else return _mm512_shuffle_f32x4(x, x, DISTANCE == 4 ? 0xb1 : 0x4e);
}
template <int COUNT, int DISTANCE = 1>
FASTTX_INLINE vf sum_lanes(vf* c) {
  if constexpr (DISTANCE == W) {
    return c[0];
  } else if constexpr (COUNT == 1) {
    c[0] += (vf)exchange<DISTANCE>((__m512)c[0]);
    return sum_lanes<1, 2 * DISTANCE>(c);
  } else {
    constexpr __mmask16 odd[] = {0, 0xaaaa, 0xcccc, 0, 0xf0f0, 0, 0, 0, 0xff00};
    FASTTX_UNROLL(8)
    for (int j = 0; j < COUNT / 2; j++) {
      const __m512 x = (__m512)c[2 * j], y = (__m512)c[2 * j + 1];
      c[j] = (vf)_mm512_mask_blend_ps(odd[DISTANCE], x, y) +
             (vf)exchange<DISTANCE>(_mm512_mask_blend_ps(odd[DISTANCE], y, x));
    }
    return sum_lanes<COUNT / 2, 2 * DISTANCE>(c);
  }
}
#else
template <int COUNT>
FASTTX_INLINE vf sum_lanes(vf* c) {
  vf t[W] = {};
  FASTTX_UNROLL(8)
  for (int j = 0; j < COUNT; j++) t[j] = c[j];
  transpose(t);
  FASTTX_UNROLL(3)
  for (int half = W / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) t[j] += t[j + half];
  return t[0];
}
#endif

}  // namespace
}  // namespace fasttx::FASTTX_ISA

#include "cpu/vec_math.h"
