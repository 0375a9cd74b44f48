// One row of logits: its statistics and its gradient, for the losses.
//
// A row's statistics are a reference value near its maximum (peak) and the log of the sum of
// exp(x - peak) (log_sum): kept apart, exp(x - peak - log_sum) is as exact for large logits as for
// small ones. The reference is the maximum of the first block; a block whose maximum is far above
// it is done again with its own.
#pragma once
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr float LOWEST = -3.402823466e38f;
constexpr float NOT_A_NUMBER = __builtin_nanf("");
constexpr int64_t BLOCK = 2048;
constexpr float FAR = 8.0f;

enum Smoothing { PLAIN, UNIFORM, WEIGHTED };

// The gradient's rounding to 16 bits gives away more than a polynomial of degree 4 does (7e-7).
template <class T>
constexpr int GRADIENT_DEGREE = sizeof(T) == 4 ? 6 : 4;

struct Row {
  float peak, log_sum;
  float weighted_sum;  // of weight * x, for label smoothing
};

struct Sums {
  vf total[4], peak[4], weighted[4];
};

template <Smoothing S>
FASTTX_INLINE void add(Sums& a, int u, vf x, vf reference, const float* weight) {
  a.peak[u] = max(a.peak[u], x);
  a.total[u] += exp2<6>((x - reference) * set1(LOG2E));
  if constexpr (S == UNIFORM) a.weighted[u] += x;
  if constexpr (S == WEIGHTED) a.weighted[u] = fma(load(weight), x, a.weighted[u]);
}

template <class T, Smoothing S>
FASTTX_INLINE void add_block(Sums& a, const T* x, const float* weight, int64_t n, vf reference) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    FASTTX_UNROLL(4)
    for (int u = 0; u < 4; u++)
      add<S>(a, u, load(x + i + u * W), reference, S == WEIGHTED ? weight + i + u * W : nullptr);
  for (; i < n; i += W) {
    const int rest = (int)min64(W, n - i);
    const vmask inside = less(lane_index(), set1i(rest));
    const vf v = load_partial(x + i, rest);
    a.peak[0] = max(a.peak[0], select(inside, v, set1(-INF)));
    a.total[0] += zero_unless(inside, exp2<6>((v - reference) * set1(LOG2E)));
    if constexpr (S == UNIFORM) a.weighted[0] += v;
    if constexpr (S == WEIGHTED) a.weighted[0] = fma(load_partial(weight + i, rest), v, a.weighted[0]);
  }
}

template <class T>
float largest(const T* x, int64_t n) {
  vf m = set1(LOWEST);
  for (int64_t i = 0; i < n; i += W) {
    const int rest = (int)min64(W, n - i);
    const vf v = rest == W ? load(x + i) : load_partial(x + i, rest);
    m = max(m, select(less(lane_index(), set1i(rest)), v, set1(LOWEST)));
  }
  const float m1 = hmax(m);
  return m1 > LOWEST ? m1 : LOWEST;
}

template <class T, Smoothing S>
Row row_statistics(const T* x, const float* weight, int64_t V) {
  Sums a = {};
  float reference = largest(x, min64(V, BLOCK));
  for (int64_t begin = 0; begin < V;) {
    Sums b = a;
    for (auto& p : b.peak) p = set1(LOWEST);
    add_block<T, S>(b, x + begin, weight + begin, min64(BLOCK, V - begin), set1(reference));
    const vf peak = max(max(b.peak[0], b.peak[1]), max(b.peak[2], b.peak[3]));
    if (__builtin_expect(any(less(set1(reference + FAR), peak)), 0)) {
      const float higher = hmax(peak);
      const vf scale = exp2<6>((set1(reference) - set1(higher)) * set1(LOG2E));
      for (auto& t : a.total) t *= scale;
      reference = higher;
    } else {
      a = b;
      begin += BLOCK;
    }
  }
  // One term often rules the sum: its last bits are the gradient's.
  double total[4] = {};
  for (int lane = 0; lane < W; lane++)
    for (int u = 0; u < 4; u++) total[u] += a.total[u][lane];
  const float weighted = hsum((a.weighted[0] + a.weighted[1]) + (a.weighted[2] + a.weighted[3]));
  const double sum = (total[0] + total[1]) + (total[2] + total[3]);
  return {reference, (float)__builtin_log(sum), weighted};
}

template <class T>
FASTTX_INLINE void store_two(T* p, vf a, vf b) {
  store(p, a);
  store(p + W, b);
}
#if defined(__AVX512BF16__)
// Gradients below 2^-126 become 0 here.
FASTTX_INLINE void store_two(bf16* p, vf a, vf b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#endif

// dx = rise * softmax(x) - fall * weight, minus hit at the target (which may lie outside of these V
// classes). dx may be x.
struct Slope {
  float rise, fall, hit;
};

template <class T, Smoothing S>
void row_gradient(T* dx, const T* x, const float* weight, int64_t V, int64_t target, Row row,
                  Slope g) {
  constexpr int DEG = GRADIENT_DEGREE<T>;
  const vf peak = set1(row.peak), shift = set1(row.log_sum * LOG2E), log2e = set1(LOG2E);
  const vf rise = set1(g.rise), fall = set1(g.fall);
  const bool has_target = target >= 0 && target < V;
  const float at_target = has_target ? to_float(x[target]) : 0.0f;
  const auto slope = [&](vf v, const float* w, int rest) __attribute__((always_inline)) {
    const vf p = exp2<DEG>(fms(v - peak, log2e, shift));
    if constexpr (S == UNIFORM) return fms(p, rise, fall);
    return fms(p, rise, fall * (rest == W ? load(w) : load_partial(w, rest)));
  };
  int64_t i = 0;
  for (; i + 2 * W <= V; i += 2 * W) {
    const vf a = slope(load(x + i), weight + i, W), b = slope(load(x + i + W), weight + i + W, W);
    store_two(dx + i, a, b);
  }
  for (; i < V; i += W) {
    const int rest = (int)min64(W, V - i);
    store_partial(dx + i, slope(load_partial(x + i, rest), weight + i, rest), rest);
  }
  if (!has_target) return;
  const vf p = exp2<6>(fms(set1(at_target) - peak, log2e, shift));
  const float w = S == WEIGHTED ? weight[target] : 1.0f;
  from_float(g.rise * p[0] - g.hit - g.fall * w, dx + target);
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
