// linear_cross_entropy by blocks of classes. The logits of a block lie [classes][rows], so that rows
// are the lanes of vectors: maximum, sum and slope are vertical. A first walk over the classes finds
// each row's statistics, a second one the gradients of a block's logits and from them its rows of
// dweight, which are whole, and its part of dx.
#include "cpu/cross_entropy_row.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/strip.h"

namespace fasttx::FASTTX_ISA {
namespace {

// Classes whose statistics are one number a row, and rows done together.
constexpr int64_t PART = 512, COLUMNS = 4 * W;

template <class T>
struct Walk {
  const fasttx_class_walk& a;
  int64_t n = a.x.sizes[0], K = a.x.sizes[1], V = a.weight.sizes[0], k = a.kept.sizes[1];
  int64_t row = round_up(max64(n, 1), COLUMNS);
  // Classes of a block, whose logits the second level cache holds.
  int64_t most = min64(round_up(V, PART), max64(1, ((int64_t)1 << 18) / row / PART) * PART);
  T* logits = (T*)scratch(SCRATCH_HEAD, most * row * sizeof(T) + 64);

  const int64_t* target() const { return (const int64_t*)a.target.data; }
  const float* class_weight() const { return (const float*)a.class_weight.data; }
  T* kept(int64_t v) const { return (T*)a.kept.data + v * a.kept.strides[0]; }

  // Logits of classes v .. v + count - 1 for rows m ...
  int products(int64_t v, int64_t count, int64_t m) const {
    struct Context {
      const fasttx_tensor* bias;
      T* out;
      int64_t row, v, m;
    } context = {&a.bias, logits, row, v, m};
    const Term term = {from_row(matrix(a.weight), v), from_row(matrix(a.x), m), K};
    return multiply(
        &term, 1, count, n - m,
        [](void* p, float* s, int64_t i, int64_t rows, int64_t j, int64_t lanes) {
          const Context& c = *(const Context*)p;
          add_bias<T>(s, rows, *c.bias, c.v + i);
          put_columns<T>(s, rows, lanes, {c.out, 0, c.row, 1}, i, c.m + j);
        },
        &context);
  }

  // f(first class of a part of the block, its classes, first row of COLUMNS).
  template <class F>
  void tiles(int64_t count, const F& f) const {
    const int64_t parts = (count + PART - 1) / PART, columns = row / COLUMNS;
    parallel_items(parts * columns, num_workers(), [&](int64_t, int64_t item) {
      const int64_t c = item / columns * PART;
      f(c, min64(PART, count - c), item % columns * COLUMNS);
    });
  }
};

// Of [parts][row]: the maximum, the sum of exp(x - it), the sum of class_weight * x.
struct Statistics {
  float *peak, *sum, *weighted;
};

template <class T>
void part_statistics(const Walk<T>& w, const Statistics& s, int64_t v, int64_t c, int64_t count,
                     int64_t m) {
  const T* x = w.logits + c * w.row + m;
  const int64_t at = (v + c) / PART * w.row + m;
  const float* weight = w.class_weight();
  vf peak[4], sum[4] = {}, weighted[4] = {};
  for (vf& p : peak) p = set1(LOWEST);
  for (int64_t i = 0; i < count; i++)
    FASTTX_UNROLL(4)
    for (int u = 0; u < 4; u++) peak[u] = max(peak[u], load(x + i * w.row + u * W));
  const int64_t keep = min64(COLUMNS, w.k - m);
  for (int64_t i = 0; i < count; i++) {
    const vf share = set1(weight ? weight[v + c + i] : 1.0f);
    FASTTX_UNROLL(4)
    for (int u = 0; u < 4; u++) {
      const vf y = load(x + i * w.row + u * W);
      sum[u] += exp2<6>((y - peak[u]) * set1(LOG2E));
      if (s.weighted) weighted[u] = fma(share, y, weighted[u]);
    }
    if (keep > 0) __builtin_memcpy(w.kept(v + c + i) + m, x + i * w.row, keep * sizeof(T));
  }
  for (int u = 0; u < 4; u++) {
    store(s.peak + at + u * W, peak[u]);
    store(s.sum + at + u * W, sum[u]);
    if (s.weighted) store(s.weighted + at + u * W, weighted[u]);
  }
}

template <class T>
int statistics(const fasttx_class_walk& a) {
  const Walk<T> w = {a};
  const int64_t parts = (w.V + PART - 1) / PART, size = parts * w.row;
  float* memory = (float*)scratch(SCRATCH_TILE, 3 * size * 4 + 64);
  if (!w.logits || !memory) return FASTTX_NO_MEMORY;
  if (w.k > 0) prefer_large_pages(a.kept.data, w.V * a.kept.strides[0] * sizeof(T));
  const Statistics s = {memory, memory + size, a.weighted.data ? memory + 2 * size : nullptr};
  float *peak = (float*)a.peak.data, *log_sum = (float*)a.log_sum.data;
  float *at_target = (float*)a.at_target.data, *weighted = (float*)a.weighted.data;
  for (int64_t v = 0; v < w.V; v += w.most) {
    const int64_t count = min64(w.most, w.V - v);
    if (int status = w.products(v, count, 0)) return status;
    for (int64_t m = 0; m < w.n; m++) {
      const int64_t c = w.target()[m] - v;
      if (c >= 0 && c < count) at_target[m] = to_float(w.logits[c * w.row + m]);
    }
    w.tiles(count, [&](int64_t c, int64_t many, int64_t m) { part_statistics(w, s, v, c, many, m); });
  }
  parallel_items(w.n, num_workers(), [&](int64_t, int64_t m) {
    float highest = LOWEST;
    for (int64_t p = 0; p < parts; p++)
      if (s.peak[p * w.row + m] > highest) highest = s.peak[p * w.row + m];
    double sum = 0, rest = 0;
    for (int64_t p = 0; p < parts; p++) {
      sum += s.sum[p * w.row + m] * __builtin_exp((double)s.peak[p * w.row + m] - highest);
      if (s.weighted) rest += s.weighted[p * w.row + m];
    }
    peak[m] = highest;
    log_sum[m] = (float)__builtin_log(sum);
    if (weighted) weighted[m] = (float)rest;
  });
  return FASTTX_OK;
}

// Of each row: peak, log_sum in base 2, rise, fall; zeros up to `row`.
struct Slopes {
  float *peak, *shift, *rise, *fall;
};

template <class T>
void part_slopes(const Walk<T>& w, const Slopes& s, int64_t v, int64_t c, int64_t count, int64_t m) {
  constexpr int DEG = GRADIENT_DEGREE<T>;
  const float* weight = w.class_weight();
  const int64_t keep = min64(COLUMNS, w.k - m);
  vf peak[4], shift[4], rise[4], fall[4];
  for (int u = 0; u < 4; u++) {
    peak[u] = load(s.peak + m + u * W);
    shift[u] = load(s.shift + m + u * W);
    rise[u] = load(s.rise + m + u * W);
    fall[u] = load(s.fall + m + u * W);
  }
  for (int64_t i = c; i < c + count; i++) {
    T* x = w.logits + i * w.row + m;
    const T* from = x;
    if (keep == COLUMNS) from = w.kept(v + i) + m;
    else if (keep > 0) __builtin_memcpy(x, w.kept(v + i) + m, keep * sizeof(T));
    const vf share = set1(weight ? weight[v + i] : 1.0f);
    FASTTX_UNROLL(2)
    for (int u = 0; u < 4; u += 2) {
      vf g[2];
      FASTTX_UNROLL(2)
      for (int t = 0; t < 2; t++)
        g[t] = fms(exp2<DEG>(fms(load(from + (u + t) * W) - peak[u + t], set1(LOG2E), shift[u + t])),
                   rise[u + t], fall[u + t] * share);
      store_two(x + u * W, g[0], g[1]);
    }
  }
}

template <class T>
int gradients(const fasttx_class_walk& a) {
  const Walk<T> w = {a};
  const bool narrow = sizeof(T) < 4 && w.V > w.most;
  const int64_t sums = a.need & 1 && narrow ? w.n * w.K : 0;
  float* memory = (float*)scratch(SCRATCH_TILE, (4 * w.row + sums) * 4 + 64);
  if (!w.logits || !memory) return FASTTX_NO_MEMORY;
  const Slopes s = {memory, memory + w.row, memory + 2 * w.row, memory + 3 * w.row};
  const float *scales = (const float*)a.scales.data, *at_target = (const float*)a.at_target.data;
  __builtin_memset(memory, 0, 4 * w.row * 4);
  for (int64_t m = 0; m < w.n; m++) {
    s.peak[m] = ((const float*)a.peak.data)[m];
    s.shift[m] = ((const float*)a.log_sum.data)[m] * LOG2E;
    s.rise[m] = scales[m];
    s.fall[m] = scales[w.n + m];
  }
  float* sum = sums ? memory + 4 * w.row : (float*)a.dx.data;
  for (int64_t v = 0; v < w.V; v += w.most) {
    const int64_t count = min64(w.most, w.V - v);
    int status = w.k < w.n ? w.products(v, count, w.k) : FASTTX_OK;
    w.tiles(count, [&](int64_t c, int64_t many, int64_t m) { part_slopes(w, s, v, c, many, m); });
    for (int64_t m = 0; m < w.n; m++) {
      const int64_t c = w.target()[m] - v;
      if (c < 0 || c >= count) continue;
      const vf p = exp2<6>(fms(set1(at_target[m] - s.peak[m]), set1(LOG2E), set1(s.shift[m])));
      const float share = a.class_weight.data ? w.class_weight()[v + c] : 1.0f;
      from_float(s.rise[m] * p[0] - scales[2 * w.n + m] - s.fall[m] * share, w.logits + c * w.row + m);
    }
    const Operand g = {w.logits, a.x.dtype, w.row, 1};
    if (a.need & 4) {
      const Operand out = {a.dbias.data, a.dbias.dtype, a.dbias.strides[0], 1};
      for (int64_t c = 0; c < count; c++) {
        vf total[4] = {};
        for (int64_t m = 0; m < w.n; m += W)
          total[m / W % 4] += load_partial(w.logits + c * w.row + m, (int)min64(W, w.n - m));
        double sum = 0;
        for (const vf& t : total)
          for (int lane = 0; lane < W; lane++) sum += t[lane];
        from_float((float)sum, element<T>(out, v + c, 0));
      }
    }
    if (a.need & 2 && status == FASTTX_OK) {
      const Term term = {g, transposed(matrix(a.x)), w.n};
      const Operand out = from_row(matrix(a.dweight), v);
      status = multiply_into(&term, 1, count, w.K,
                             {(void*)out.data, out.dtype, out.row, out.column, nullptr, true, true});
    }
    if (a.need & 1 && status == FASTTX_OK) {
      const Term term = {transposed(g), transposed(from_row(matrix(a.weight), v)), count};
      const Operand out = matrix(a.dx);
      status = multiply_into(&term, 1, w.n, w.K,
                             {a.dx.data, out.dtype, out.row, out.column, sum, v == 0, v + count == w.V});
    }
    if (status != FASTTX_OK) return status;
  }
  return FASTTX_OK;
}

}  // namespace

int linear_cross_entropy_statistics(const fasttx_class_walk& a) {
  int status = FASTTX_OK;
  with_type(a.x.dtype, [&](auto t) { status = statistics<decltype(t)>(a); });
  return status;
}
int linear_cross_entropy_gradients(const fasttx_class_walk& a) {
  int status = FASTTX_OK;
  with_type(a.x.dtype, [&](auto t) { status = gradients<decltype(t)>(a); });
  return status;
}

}  // namespace fasttx::FASTTX_ISA
