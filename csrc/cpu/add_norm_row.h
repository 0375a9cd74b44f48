// What add_norm's forward and backward share: rows of any dtype and stride as fp32 in the cache.
#pragma once
#include "cpu/add_norm.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/stream.h"
#include "cpu/vec.h"
#include "fasttx.h"

namespace fasttx::FASTTX_ISA {
namespace {

template <class T>
FASTTX_INLINE T* row_at(const fasttx_rows& t, int64_t m) {
  if (!t.size1) return (T*)t.data + m * t.stride[2];
  const int64_t k = m % t.size2, rest = m / t.size2;
  return (T*)t.data + rest / t.size1 * t.stride[0] + rest % t.size1 * t.stride[1] + k * t.stride[2];
}

// f(type) with a value of t's element type.
template <class F>
FASTTX_INLINE void with_type(const fasttx_rows& t, const F& f) {
  if (t.dtype == FASTTX_F32) f(float{});
  else if (t.dtype == FASTTX_BF16) f(bf16{});
  else f(f16{});
}

// to[n] = row m of t, or to[n] + that; `to` is padded to whole vectors.
template <bool ADD>
__attribute__((noinline)) void read_row(const fasttx_rows& t, int64_t m, int64_t N, float* to) {
  with_type(t, [&](auto type) {
    typedef decltype(type) T;
    const T* p = row_at<T>(t, m);
    int64_t n = 0;
    if (t.column == 1)
      for (; n + W <= N; n += W) store(to + n, ADD ? load(to + n) + load(p + n) : load(p + n));
    for (; n < N; n += W) {
      const vf v = load_strided(p + n * t.column, t.column, (int)(N - n));
      store(to + n, ADD ? load(to + n) + v : v);
    }
  });
}

FASTTX_NOINLINE inline void write_row(const fasttx_rows& t, int64_t m, int64_t N,
                                         const float* from) {
  with_type(t, [&](auto type) {
    typedef decltype(type) T;
    T* p = row_at<T>(t, m);
    int64_t n = 0;
    if (t.column == 1)
      for (; n + W <= N; n += W) store(p + n, load(from + n));
    for (; n < N; n += W) store_strided(p + n * t.column, t.column, load(from + n), (int)(N - n));
  });
}

FASTTX_INLINE void drop_row(const Dropout& d, const uint16_t* numbers, int64_t N, float* row) {
  const vf scale = set1(d.keep_scale);
  for (int64_t n = 0; n < N; n += W)
    store(row + n, zero_unless(keep_columns(numbers + n, d.threshold), load(row + n) * scale));
}

// The parameters in fp32, read once a call; each padded to whole vectors. weight is 1 and bias 0
// where they are absent; x_bias may be null.
struct Parameters {
  const float *weight, *bias, *x_bias;
};

struct Problem {
  const fasttx_add_norm* a;
  int64_t M, N, padded;  // padded: N rounded up to what one call of Philox covers
  Dropout dropout;
  Parameters p;
};

// Whether an output goes past the cache: where a call that touches so many tensors touches more than
// its last level holds.
template <class T>
FASTTX_INLINE bool streams(const Problem& p, const fasttx_rows& to, int tensors) {
#if FASTTX_AVX512
  const int64_t row = p.N * sizeof(T);
  return p.M * row * tensors > cache_bytes() && ((uintptr_t)to.data | row) % 64 == 0;
#else
  (void)p, (void)to, (void)tensors;
  return false;
#endif
}

FASTTX_INLINE const float* parameter(const fasttx_rows& t, int64_t N, float* to, float absent) {
  if (t.data) read_row<false>(t, 0, N, to);
  else
    for (int64_t n = 0; n < N; n += W) store(to + n, set1(absent));
  return to;
}

FASTTX_INLINE bool make_problem(const fasttx_add_norm& a, Problem* p) {
  p->a = &a;
  p->M = a.M;
  p->N = a.N;
  p->padded = round_up(a.N, 8 * W);
  p->dropout = make_dropout(a.dropout_p, a.seed);
  float* memory = (float*)scratch(SCRATCH_SHARED, 3 * p->padded * sizeof(float));
  if (!memory) return false;
  p->p.weight = parameter(a.weight, a.N, memory, 1);
  p->p.bias = parameter(a.bias, a.N, memory + p->padded, 0);
  p->p.x_bias = a.x_bias.data ? parameter(a.x_bias, a.N, memory + 2 * p->padded, 0) : nullptr;
  return true;
}

// z = residual + dropout(x + x_bias) of row m; `numbers` keeps the row's dropout numbers.
FASTTX_INLINE void sum_row(const Problem& p, int64_t m, float* z, uint16_t* numbers) {
  const fasttx_add_norm& a = *p.a;
  read_row<false>(a.x, m, p.N, z);
  if (p.p.x_bias)
    for (int64_t n = 0; n < p.N; n += W) store(z + n, load(z + n) + load(p.p.x_bias + n));
  if (p.dropout.threshold) {
    philox_row(p.dropout, p.N, (uint32_t)m, 0, 0, numbers);
    drop_row(p.dropout, numbers, p.N, z);
  }
  if (a.residual.data) read_row<true>(a.residual, m, p.N, z);
}

// hsum without a round trip through memory.
FASTTX_INLINE float sum_lanes(vf x) {
#if FASTTX_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  return hsum(x);
#endif
}

// sum of f(n) over the row's vectors, without the lanes past the end.
template <class F>
FASTTX_INLINE float sum_over(int64_t N, const F& f) {
  vf s[4] = {};
  int64_t n = 0;
  for (; n + 4 * W <= N; n += 4 * W) {
    FASTTX_UNROLL(4)
    for (int i = 0; i < 4; i++) s[i] += f(n + i * W);
  }
  for (; n + W <= N; n += W) s[0] += f(n);
  if (n < N) s[1] += zero_unless(less(lane_index(), set1i((int)(N - n))), f(n));
  return sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
