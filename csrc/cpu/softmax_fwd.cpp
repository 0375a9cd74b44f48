// softmax(scale * x + mask) and its logarithm along rows: a row's maximum, its exponentials, their
// sum and the division happen while the row is in the cache. A row wider than that is read twice,
// block by block, with the sum kept relative to a running maximum.
#include "cpu/softmax_columns.h"
#include "cpu/stream.h"

namespace fasttx::FASTTX_ISA {

int softmax_fwd(const fasttx_softmax& a);

namespace {

constexpr int64_t BLOCK = 1 << 18;  // columns whose exponentials are kept

// Degree of the exponential: what a probability is rounded to hides 7.5e-5 (bf16) and 2.6e-6 (fp16).
template <class T>
constexpr int DEGREE = 6;
template <>
constexpr int DEGREE<bf16> = 3;
template <>
constexpr int DEGREE<f16> = 4;

// The largest of n numbers; what it is where one of them is NaN is left open.
template <class S>
FASTTX_NOINLINE float top_of(const S* x, int64_t n) {
  vf m[4];
  FASTTX_UNROLL(4)
  for (int u = 0; u < 4; u++) m[u] = set1(-INF);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    FASTTX_UNROLL(4)
    for (int u = 0; u < 4; u++) m[u] = max(load(x + i + u * W), m[u]);
  }
  for (; i + W <= n; i += W) m[0] = max(load(x + i), m[0]);
  if (i < n) {
    const vf v = load_partial(x + i, (int)(n - i));
    m[1] = max(select(less(lane_index(), set1i((int)(n - i))), v, m[1]), m[1]);
  }
  return top_lane(max(max(m[0], m[1]), max(m[2], m[3])));
}
#if FASTTX_AVX512
// 32 numbers at a time, as integers in the order of the numbers; a NaN may win or lose.
template <>
FASTTX_NOINLINE float top_of<bf16>(const bf16* x, int64_t n) {
  const __m512i sign = _mm512_set1_epi16(0x7fff), lowest = _mm512_set1_epi16((short)0x8000);
  const auto ordered = [&](__m512i v) {
    // v ^ (v >> 15 & 0x7fff)
    return _mm512_ternarylogic_epi32(v, _mm512_srai_epi16(v, 15), sign, 0x78);
  };
  __m512i m[2] = {lowest, lowest};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    m[0] = _mm512_max_epi16(m[0], ordered(_mm512_loadu_si512(x + i)));
    m[1] = _mm512_max_epi16(m[1], ordered(_mm512_loadu_si512(x + i + 32)));
  }
  for (; i < n; i += 32) {
    const int64_t rest = n - i;
    const __mmask32 live = rest >= 32 ? ~0u : (1u << rest) - 1;
    const __m512i v = ordered(_mm512_maskz_loadu_epi16(live, x + i));
    m[0] = _mm512_mask_max_epi16(m[0], live, m[0], v);
  }
  const __m512i both = _mm512_max_epi16(m[0], m[1]);
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16);
  const int top = _mm512_reduce_max_epi32(_mm512_max_epi32(low, _mm512_srai_epi32(both, 16)));
  const uint16_t bits = (uint16_t)(top ^ (top >> 15 & 0x7fff));
  return to_float(bf16{bits});
}
#endif

// exp(factor * (x - top)) of n numbers, kept in e unless it is null; the sum. e is padded to whole
// vectors. next: memory to ask for meanwhile, n elements, or null.
template <int DEGREE, bool KEEP, class S>
FASTTX_NOINLINE float exponentials(const S* x, int64_t n, float top, float factor, float* e,
                                   const S* next) {
  const vf shift = set1(top), by = set1(factor);
  const auto at = [&](int64_t i) { return exp2<DEGREE>((load(x + i) - shift) * by); };
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    if (next)
      for (int64_t b = 0; b < (int64_t)(4 * W * sizeof(S)); b += 64)
        __builtin_prefetch((const char*)(next + i) + b, 0, 3);
    FASTTX_UNROLL(4)
    for (int u = 0; u < 4; u++) {
      const vf v = at(i + u * W);
      if (KEEP) store(e + i + u * W, v);
      sum[u] += v;
    }
  }
  for (; i < n; i += W) {
    const vf z = load_partial(x + i, (int)min64(W, n - i));
    const vf v = first(n - i, exp2<DEGREE>((z - shift) * by));
    if (KEEP) store(e + i, v);
    sum[0] += v;
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// to = f(i) for n numbers, i in steps of one vector.
template <bool STREAM, class T, class F>
FASTTX_INLINE void write_all(T* to, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) store_two<STREAM>(to + i, f(i), f(i + W));
  for (; i < n; i += W)
    if (i + W <= n) store(to + i, f(i));
    else store_partial(to + i, f(i), (int)(n - i));
}
// to = e * inverse
template <bool STREAM, class T>
FASTTX_NOINLINE void divide(const float* e, int64_t n, float inverse, T* to) {
  const vf by = set1(inverse);
  write_all<STREAM>(to, n, [&](int64_t i) { return load(e + i) * by; });
}
// to = (x - top) * scale - log_sum; what is past the end of x is readable.
template <bool STREAM, class S, class T>
FASTTX_NOINLINE void subtract(const S* x, int64_t n, float top, float scale, float log_sum, T* to) {
  const vf shift = set1(top), by = set1(scale), log = set1(log_sum);
  const auto at = [&](vf v) { return fms(v - shift, by, log); };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
    store_two<STREAM>(to + i, at(load(x + i)), at(load(x + i + W)));
  for (; i < n; i += W) {
    const int rest = (int)min64(W, n - i);
    store_partial(to + i, at(load_partial(x + i, rest)), rest);
  }
}

// scale * x + mask of columns [n, n + count) in fp32, -inf where hidden.
FASTTX_NOINLINE void logits(const Problem& p, const Row& r, int64_t n, int64_t count, float* to) {
  const fasttx_softmax& a = *p.a;
  const vf scale = set1((float)a.scale);
  if (!a.mask.data) {
    read_row(a.x, r, n, count, to);
    for (int64_t c = 0; c < count; c += W) store(to + c, load(to + c) * scale);
    return;
  }
  const int64_t step = a.mask.strides[3], x_step = a.x.strides[3];
  with_mask_type(a.mask.dtype, [&](auto mask_type) {
    typedef decltype(mask_type) E;
    const E* m = address<E>(a.mask, r) + n * step;
    with_type(a.x.dtype, [&](auto type) {
      typedef decltype(type) T;
      const T* x = address<T>(a.x, r) + n * x_step;
      int64_t c = 0;
      if (x_step == 1 && step == 1)
        for (; c + W <= count; c += W) store(to + c, add_mask(load(x + c), scale, load(m + c)));
      for (; c < count; c += W) {
        const int rest = (int)min64(W, count - c);
        store(to + c, add_mask(load_strided(x + c * x_step, x_step, rest), scale,
                               load_mask(m + c * step, step, rest)));
      }
    });
  });
}

template <class T>
struct Forward {
  const Problem& p;
  bool plain;   // the logits are scale * x of T side by side, scale > 0
  bool stream;
  float scale;  // of what a row is read as

  static float log_of(float x) { return log2(set1(x))[0] * LN2; }

  // Columns [n, n + count) of the result into memory side by side, or into `to` otherwise.
  template <class F>
  void write(const Row& r, int64_t n, int64_t count, float* to, const F& f) const {
    const fasttx_tensor& out = p.a->out;
    if (out.strides[3] != 1) {
      f(to);
      write_row(out, r, n, count, to);
    } else {
      f(address<T>(out, r) + n);
    }
  }

  // One row, read by blocks: fetch(n, count) gives the address of columns [n, n + count).
  template <class S, class Fetch>
  FASTTX_INLINE void row(const Row& r, int64_t live, float* e, const S* next,
                         const Fetch& fetch) const {
    const float factor = scale * LOG2E;
    const bool log = p.a->log;
    float top = -INF, sum = 0;
    const S* x = nullptr;
    for (int64_t n = 0; n < live; n += BLOCK) {
      const int64_t count = min64(BLOCK, live - n);
      x = fetch(n, count);
      const float here = top_of(x, count);
      if (n && here > top) sum *= exp2<6>(set1((top - here) * factor))[0];
      // NaN is below nothing and above nothing: it reaches the sum by itself.
      top = n && !(here > top) ? top : here;
      const float shift = top == -INF ? 0.0f : top;
      if (log)
        sum += exponentials<6, false>(x, count, shift, factor, nullptr, next);
      else if (live > BLOCK)
        sum += exponentials<DEGREE<T>, false>(x, count, shift, factor, nullptr, next);
      else
        sum += exponentials<DEGREE<T>, true>(x, count, shift, factor, e, next);
    }
    const float shift = top == -INF ? 0.0f : top;
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum, log_sum = log ? log_of(sum) : 0.0f;
    for (int64_t n = 0; n < live; n += BLOCK) {
      const int64_t count = min64(BLOCK, live - n);
      if (live > BLOCK) x = fetch(n, count);
      if (log) {
        write(r, n, count, e, [&](auto* to) {
          if (sum == 0) return empty(to, count);
          if (FASTTX_AVX512 && stream)
            subtract<FASTTX_AVX512>(x, count, shift, scale, log_sum, to);
          else subtract<false>(x, count, shift, scale, log_sum, to);
        });
        continue;
      }
      if (live > BLOCK) exponentials<DEGREE<T>, true>(x, count, shift, factor, e, (const S*)nullptr);
      write(r, n, count, e, [&](auto* to) {
        if (FASTTX_AVX512 && stream) divide<FASTTX_AVX512>(e, count, inverse, to);
        else divide<false>(e, count, inverse, to);
      });
    }
    if (live < p.N) fill_row(p.a->out, r, live, p.N, log ? -INF : 0.0f);
  }
  template <class E>
  static void empty(E* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) from_float(-INF, to + i);
  }

  // Vector u of a row of p.N numbers, -INF past its end.
  FASTTX_INLINE vf vector_of(const T* x, int u) const {
    const int64_t live = p.N - u * W;
    if (live >= W) return load(x + u * W);
    if (live <= 0) return set1(-INF);
    return select(less(lane_index(), set1i((int)live)), load_partial(x + u * W, (int)live),
                  set1(-INF));
  }
  FASTTX_INLINE void put_vector(T* to, int u, vf y) const {
    const int64_t live = p.N - u * W;
    if (live >= W) store(to + u * W, y);
    else if (live > 0) store_partial(to + u * W, y, (int)live);
  }
  // exp(scale * (v - top)) in v, and their sum; the top, 0 where nothing is visible.
  template <int V, int HERE>
  FASTTX_INLINE float narrow_sum(const T* x, vf* v, float* top) const {
    vf m = set1(-INF), sum = {};
    FASTTX_UNROLL(8)
    for (int u = 0; u < V; u++) m = max(v[u] = vector_of(x, u), m);
    *top = top_lane(m);
    if (*top == -INF) *top = 0.0f;
    const vf shift = set1(*top), factor = set1(scale * LOG2E);
    FASTTX_UNROLL(8)
    for (int u = 0; u < V; u++) sum += v[u] = exp2<HERE>((v[u] - shift) * factor);
    return sum_lanes(sum);
  }

  // Rows of at most V vectors stay in registers: three passes through memory took as long as the
  // arithmetic.
  template <int V>
  FASTTX_NOINLINE void narrow_rows(Row r, int64_t count) const {
    for (; count; count--, r = next_row(p.a->x.sizes, r)) {
      T* to = address<T>(p.a->out, r);
      float top;
      vf v[V];
      const float sum = narrow_sum<V, DEGREE<T>>(address<T>(p.a->x, r), v, &top);
      const vf inverse = set1(sum == 0 ? 0.0f : 1.0f / sum);
      FASTTX_UNROLL(8)
      for (int u = 0; u < V; u++) put_vector(to, u, v[u] * inverse);
    }
  }
  // The same for the logarithm, which is taken of W rows at once.
  template <int V>
  FASTTX_NOINLINE void narrow_log_rows(Row r, int64_t count) const {
    const vf by = set1(scale);
    while (count) {
      const int here = (int)min64(W, count);
      const T* x[W];
      T* to[W];
      alignas(64) float top[W], sum[W] = {}, log_sum[W];
      for (int i = 0; i < here; i++, r = next_row(p.a->x.sizes, r)) {
        vf v[V];
        x[i] = address<T>(p.a->x, r);
        to[i] = address<T>(p.a->out, r);
        sum[i] = narrow_sum<V, 6>(x[i], v, &top[i]);
      }
      store(log_sum, log2(load(sum)) * set1(LN2));
      for (int i = 0; i < here; i++) {
        const vf shift = set1(top[i]), log = set1(log_sum[i]);
        FASTTX_UNROLL(8)
        for (int u = 0; u < V; u++)
          put_vector(to[i], u,
                     sum[i] == 0 ? set1(-INF) : fms(vector_of(x[i], u) - shift, by, log));
      }
      count -= here;
    }
  }
  template <int V>
  void narrow_rows_of(Row r, int64_t count) const {
    if (p.a->log) narrow_log_rows<V>(r, count);
    else narrow_rows<V>(r, count);
  }
  bool narrow() const {
    return plain && !stream && !p.a->causal && p.N <= 8 * W && p.a->out.strides[3] == 1;
  }

  void rows(Row r, int64_t count, float* e, float* t) const {
    if (narrow()) {
      if (p.N <= 2 * W) return narrow_rows_of<2>(r, count);
      if (p.N <= 4 * W) return narrow_rows_of<4>(r, count);
      return narrow_rows_of<8>(r, count);
    }
    const int64_t* sizes = p.a->x.sizes;
    for (; count; count--, r = next_row(sizes, r)) {
      const int64_t live = seen(p, r.i[2]);
      if (plain) {
        const T* x = address<T>(p.a->x, r);
        const T* next = count > 1 && live <= BLOCK ? address<T>(p.a->x, next_row(sizes, r)) : nullptr;
        row<T>(r, live, e, next, [&](int64_t n, int64_t) { return x + n; });
      } else {
        row<float>(r, live, e, (const float*)nullptr, [&](int64_t n, int64_t c) {
          logits(p, r, n, c, t);
          return (const float*)t;
        });
      }
    }
  }

  static int run(const Problem& p) {
    const fasttx_softmax& a = *p.a;
    Forward f = {p, false, false, 1.0f};
    f.plain = !a.mask.data && a.scale > 0 && a.x.dtype == a.out.dtype && a.x.strides[3] == 1;
    if (f.plain) f.scale = (float)a.scale;
    f.stream = streams(a.out, 2 * p.M * p.N);
    const int64_t padded = round_up(min64(p.N, BLOCK), W) + 4 * W;
    int status = FASTTX_OK;
    each_row(p, [&](Row r, int64_t count) {
      float* memory = (float*)scratch(SCRATCH_TILE, 2 * padded * sizeof(float));
      if (!memory) {
        __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
        return;
      }
      f.rows(r, count, memory, memory + padded);
      if (f.stream) end_of_stream();
    });
    return status;
  }
};

}  // namespace

int softmax_fwd(const fasttx_softmax& a) {
  const Problem p = make_problem(a);
  if (p.M * p.N == 0) return FASTTX_OK;
  const int lanes = lane_dimension(a.x, a.out);
  if (lanes >= 0) return softmax_columns_fwd(a, lanes);
  switch (a.out.dtype) {
    case FASTTX_F32:
      return Forward<float>::run(p);
    case FASTTX_BF16:
      return Forward<bf16>::run(p);
    case FASTTX_F16:
      return Forward<f16>::run(p);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
