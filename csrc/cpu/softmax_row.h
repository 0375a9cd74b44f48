// What softmax's forward and backward share: rows of any dtype and stride, and which of their columns
// are visible.
#pragma once
#include "cpu/parallel.h"
#include "cpu/softmax.h"
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

struct Problem {
  const fasttx_softmax* a;
  int64_t M, N;
  int64_t offset;  // of the causal edge
};

inline Problem make_problem(const fasttx_softmax& a) {
  const int64_t* n = a.x.sizes;
  return {&a, n[0] * n[1] * n[2], n[3], a.lower_right ? n[3] - n[2] : 0};
}

// A row by its three indices, in the order of memory of a contiguous x.
struct Row {
  int64_t i[3];
};
FASTTX_INLINE Row row_at(const int64_t* sizes, int64_t m) {
  const int64_t rest = m / sizes[2];
  return {{rest / sizes[1], rest % sizes[1], m % sizes[2]}};
}
FASTTX_INLINE Row next_row(const int64_t* sizes, Row r) {
  if (++r.i[2] < sizes[2]) return r;
  r.i[2] = 0;
  if (++r.i[1] < sizes[1]) return r;
  r.i[1] = 0;
  r.i[0]++;
  return r;
}
FASTTX_INLINE int64_t offset_of(const fasttx_tensor& t, const Row& r) {
  return r.i[0] * t.strides[0] + r.i[1] * t.strides[1] + r.i[2] * t.strides[2];
}
template <class T>
FASTTX_INLINE T* address(const fasttx_tensor& t, const Row& r) {
  return (T*)t.data + offset_of(t, r);
}
// Columns of a row that the causal edge leaves; the first ones.
FASTTX_INLINE int64_t seen(const Problem& p, int64_t i) {
  return p.a->causal ? max64(0, min64(p.N, i + p.offset + 1)) : p.N;
}

// f(type) with a value of the element type.
template <class F>
FASTTX_INLINE void with_type(int32_t dtype, const F& f) {
  if (dtype == FASTTX_F32) f(float{});
  else if (dtype == FASTTX_BF16) f(bf16{});
  else f(f16{});
}

// Columns [n, n + count) of a row in fp32; `to` is padded to whole vectors.
FASTTX_NOINLINE inline void read_row(const fasttx_tensor& t, const Row& r, int64_t n, int64_t count,
                                     float* to) {
  with_type(t.dtype, [&](auto type) {
    typedef decltype(type) T;
    const int64_t step = t.strides[3];
    const T* p = address<T>(t, r) + n * step;
    int64_t c = 0;
    if (step == 1)
      for (; c + W <= count; c += W) store(to + c, load(p + c));
    for (; c < count; c += W) store(to + c, load_strided(p + c * step, step, (int)(count - c)));
  });
}
FASTTX_NOINLINE inline void write_row(const fasttx_tensor& t, const Row& r, int64_t n, int64_t count,
                                      const float* from) {
  with_type(t.dtype, [&](auto type) {
    typedef decltype(type) T;
    const int64_t step = t.strides[3];
    T* p = address<T>(t, r) + n * step;
    for (int64_t c = 0; c < count; c += W)
      store_strided(p + c * step, step, load(from + c), (int)min64(W, count - c));
  });
}
// Columns [n, N) of a row become `value`.
FASTTX_NOINLINE inline void fill_row(const fasttx_tensor& t, const Row& r, int64_t n, int64_t N,
                                     float value) {
  with_type(t.dtype, [&](auto type) {
    typedef decltype(type) T;
    const int64_t step = t.strides[3];
    T* p = address<T>(t, r);
    for (; n < N; n += W) store_strided(p + n * step, step, set1(value), (int)min64(W, N - n));
  });
}

// A bool mask as numbers to add: 0 or -inf.
struct Bool {
  uint8_t value;
};
FASTTX_INLINE float to_float(Bool b) { return b.value ? 0.0f : -INF; }
FASTTX_INLINE vf load(const Bool* p) {
#if FASTTX_AVX512
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return (vf)_mm512_mask_blend_ps(_mm_test_epi8_mask(x, x), _mm512_set1_ps(-INF), _mm512_setzero_ps());
#else
  vf r;
  for (int i = 0; i < W; i++) r[i] = to_float(p[i]);
  return r;
#endif
}
FASTTX_INLINE vf load_partial(const Bool* p, int n) {
  float t[W] = {};
  for (int i = 0; i < n && i < W; i++) t[i] = to_float(p[i]);
  return load(t);
}
template <class F>
FASTTX_INLINE void with_mask_type(int32_t dtype, const F& f) {
  if (dtype == FASTTX_BOOL) f(Bool{});
  else with_type(dtype, f);
}
// W elements `step` apart, as load_strided; one number for all where step is 0.
template <class E>
FASTTX_INLINE vf load_mask(const E* p, int64_t step, int n) {
  if (step == 0) return set1(to_float(*p));
  return load_strided(p, step, n);
}
// scale * x + mask, where -inf hides whatever x is.
FASTTX_INLINE vf add_mask(vf x, vf scale, vf mask) {
  return select(equal(mask, set1(-INF)), mask, fma(x, scale, mask));
}

FASTTX_INLINE vf first(int64_t n, vf x) {
  return n >= W ? x : zero_unless(less(lane_index(), set1i((int)n)), x);
}
FASTTX_INLINE float sum_lanes(vf x) {
#if FASTTX_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  return hsum(x);
#endif
}
FASTTX_INLINE float top_lane(vf x) {
#if FASTTX_AVX512
  return _mm512_reduce_max_ps((__m512)x);
#else
  return hmax(x);
#endif
}

constexpr int64_t ITEM = 32768;  // elements of an item of work

// f(first row, count) over all rows, in items of neighbouring ones.
template <class F>
void each_row(const Problem& p, const F& f) {
  const int64_t rows = max64(1, ITEM / max64(1, p.N));
  parallel_items((p.M + rows - 1) / rows, num_workers(), [&](int64_t, int64_t item) {
    const int64_t begin = item * rows, end = min64(p.M, begin + rows);
    Row r = row_at(p.a->x.sizes, begin);
    f(r, end - begin);
  });
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
