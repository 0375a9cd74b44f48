// Cross-entropy over rows of logits: one read for the loss, one read and one write for the
// gradient, or both while the row is in cache (cross_entropy_inplace).
#include "cpu/cross_entropy.h"

#include "cpu/cross_entropy_row.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace fasttx::FASTTX_ISA {
namespace {

struct Norm {
  double ce, z;
  bool nothing;  // every row is ignored
};

struct Problem {
  const fasttx_cross_entropy* a;
  const int64_t* target;
  const float* weight;
  int64_t rows, S, V;
  double weight_sum;
};

FASTTX_INLINE bool in_range(const Problem& p, int64_t t) { return t >= 0 && t < p.V; }

Norm normalisation(const Problem& p) {
  if (p.a->reduction != FASTTX_MEAN) return {1.0, 1.0, false};
  double weights = 0;
  int64_t count = 0;
  for (int64_t m = 0; m < p.rows; m++) {
    const int64_t t = p.target[m];
    if (t == p.a->ignore_index) continue;
    count++;
    weights += !in_range(p, t) ? 0.0 : p.weight ? p.weight[t] : 1.0;
  }
  return {1.0 / weights, 1.0 / (double)count, count == 0};
}

template <class T>
struct Rows {
  Problem p;
  Norm norm;
  bool forward, gradient;
  double* values;  // of each row, where they are reduced

  static T* at(const fasttx_tensor& t, int64_t m, int64_t S) {
    return (T*)t.data + m / S * t.strides[0] + m % S * t.strides[1];
  }

  Row statistics(const T* x) const {
    if (p.a->label_smoothing == 0) return row_statistics<T, PLAIN>(x, p.weight, p.V);
    if (!p.weight) return row_statistics<T, UNIFORM>(x, p.weight, p.V);
    return row_statistics<T, WEIGHTED>(x, p.weight, p.V);
  }

  void slopes(T* dx, const T* x, int64_t t, Row row, Slope g) const {
    if (g.fall == 0 || !p.weight)
      return row_gradient<T, UNIFORM>(dx, x, p.weight, p.V, t, row, g);
    return row_gradient<T, WEIGHTED>(dx, x, p.weight, p.V, t, row, g);
  }

  void fill(T* dx, int64_t stride, float value) const {
    for (int64_t c = 0; c < p.V; c += W)
      store_strided(dx + c * stride, stride, set1(value), (int)min64(W, p.V - c));
  }

  void put_loss(int64_t m, double ce, double z) const {
    if (values)
      values[m] = ce * norm.ce + z * norm.z;
    else
      ((float*)p.a->loss.data)[m] = (float)(ce + z);
  }

  void run(int64_t m) const {
    const fasttx_cross_entropy& a = *p.a;
    const int64_t t = p.target[m];
    const T* x = at(a.logits, m, p.S);
    T* dx = gradient ? at(a.dlogits, m, p.S) : nullptr;
    const int64_t stride = a.logits.strides[2], out_stride = a.dlogits.strides[2];
    float* peak = (float*)a.peak.data;
    float* log_sum = (float*)a.log_sum.data;
    if (t == a.ignore_index || !in_range(p, t)) {
      const float value = t == a.ignore_index ? 0.0f : NOT_A_NUMBER;
      if (forward) put_loss(m, value, 0);
      if (forward && peak) peak[m] = log_sum[m] = 0;
      if (gradient) fill(dx, out_stride, value);
      return;
    }
    T* packed = nullptr;
    if (stride != 1 || (gradient && out_stride != 1)) {
      packed = (T*)scratch(SCRATCH_TILE, p.V * sizeof(T));
      for (int64_t c = 0; c < p.V; c++) packed[c] = x[c * stride];
      x = packed;
    }
    const double w = p.weight ? p.weight[t] : 1.0;
    const double keep = (1.0 - a.label_smoothing) * w;
    const double share = a.label_smoothing / (double)p.V;
    Row row;
    if (forward) {
      row = statistics(x);
      const double lse = (double)row.peak + row.log_sum;
      double ce = keep * ((double)row.peak - to_float(x[t]) + row.log_sum);
      if (a.label_smoothing != 0) ce += share * (p.weight_sum * lse - row.weighted_sum);
      put_loss(m, ce, a.z_loss == 0 ? 0 : a.z_loss * lse * lse);
      if (peak) {
        peak[m] = row.peak;
        log_sum[m] = row.log_sum;
      }
    } else {
      row = {peak[m], log_sum[m], 0};
    }
    if (!gradient) return;
    double ce_scale = norm.ce, z_scale = norm.z;
    if (!forward) {
      const double up = ((const float*)a.dloss.data)[m * a.dloss.strides[0]];
      ce_scale *= up;
      z_scale *= up;
    }
    const double lse = (double)row.peak + row.log_sum;
    const double z = a.z_loss == 0 ? 0 : 2 * a.z_loss * lse * z_scale;
    const Slope g = {(float)(ce_scale * (keep + share * p.weight_sum) + z),
                     (float)(ce_scale * share), (float)(ce_scale * keep)};
    slopes(packed ? packed : dx, x, t, row, g);
    if (packed)
      for (int64_t c = 0; c < p.V; c++) dx[c * out_stride] = packed[c];
  }

  void run_all() const {
    const int64_t together = max64(1, 16384 / max64(1, p.V));
    parallel_items((p.rows + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
      const int64_t end = min64(p.rows, (item + 1) * together);
      for (int64_t m = item * together; m < end; m++) run(m);
    });
  }
};

Problem problem(const fasttx_cross_entropy& a) {
  Problem p = {&a, (const int64_t*)a.target.data, (const float*)a.weight.data,
               a.logits.sizes[0] * a.logits.sizes[1], a.logits.sizes[1], a.logits.sizes[2], 0};
  p.weight_sum = (double)p.V;
  if (p.weight && a.label_smoothing != 0) {
    p.weight_sum = 0;
    for (int64_t c = 0; c < p.V; c++) p.weight_sum += p.weight[c];
  }
  return p;
}

template <class T>
int solve(const fasttx_cross_entropy& a, bool forward, bool gradient) {
  Rows<T> rows = {problem(a), {1.0, 1.0, false}, forward, gradient, nullptr};
  const bool reduced = forward && a.reduction != FASTTX_NONE;
  if (reduced) {
    rows.values = (double*)scratch(SCRATCH_SHARED, max64(1, rows.p.rows) * sizeof(double));
    if (!rows.values) return FASTTX_NO_MEMORY;
  }
  Norm norm;
  if (forward) {
    norm = normalisation(rows.p);
    if (a.norm.data) {
      ((float*)a.norm.data)[0] = (float)norm.ce;
      ((float*)a.norm.data)[1] = (float)norm.z;
    }
    rows.norm = norm;
    // fp16 has no room for gradients divided by the number of rows.
    const bool later = gradient && a.logits.dtype == FASTTX_F16;
    if (gradient) *(float*)a.factor.data = later ? (float)norm.ce : 1.0f;
    if (later) rows.norm = {1.0, norm.z / norm.ce, norm.nothing};
  } else {
    rows.norm = {((const float*)a.norm.data)[0], ((const float*)a.norm.data)[1], false};
  }
  if (gradient && a.dlogits.data != a.logits.data)
    prefer_large_pages(a.dlogits.data, rows.p.rows * rows.p.V * sizeof(T));
  rows.run_all();
  if (reduced) {
    double sum = 0;
    for (int64_t m = 0; m < rows.p.rows; m++) sum += rows.values[m];
    if (forward && gradient) sum *= norm.ce / rows.norm.ce;
    *(float*)a.loss.data = norm.nothing ? NOT_A_NUMBER : (float)sum;
  }
  return FASTTX_OK;
}

int solve_dtype(const fasttx_cross_entropy& a, bool forward, bool gradient) {
  switch (a.logits.dtype) {
    case FASTTX_F32:
      return solve<float>(a, forward, gradient);
    case FASTTX_BF16:
      return solve<bf16>(a, forward, gradient);
    case FASTTX_F16:
      return solve<f16>(a, forward, gradient);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

template <class T>
void rescale(const fasttx_cross_entropy& a) {
  const Problem p = problem(a);
  const float factor = *(const float*)a.factor.data;
  const float* up = (const float*)a.dloss.data;
  const auto scale = [&](int64_t m) { return up[m * a.dloss.strides[0]] * factor; };
  const int64_t stride = a.dlogits.strides[2];
  const int64_t together = max64(1, 16384 / max64(1, p.V));
  parallel_items((p.rows + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
    const int64_t end = min64(p.rows, (item + 1) * together);
    for (int64_t m = item * together; m < end; m++) {
      const float by = scale(m);
      if (by == 1.0f || p.target[m] == a.ignore_index) continue;
      T* dx = Rows<T>::at(a.dlogits, m, p.S);
      for (int64_t c = 0; c < p.V; c += W) {
        const int rest = (int)min64(W, p.V - c);
        T* at = dx + c * stride;
        store_strided(at, stride, load_strided(at, stride, rest) * set1(by), rest);
      }
    }
  });
}

}  // namespace

int cross_entropy_fwd(const fasttx_cross_entropy& a) { return solve_dtype(a, true, false); }
int cross_entropy_bwd(const fasttx_cross_entropy& a) { return solve_dtype(a, false, true); }
int cross_entropy_inplace(const fasttx_cross_entropy& a) { return solve_dtype(a, true, true); }

int cross_entropy_rescale(const fasttx_cross_entropy& a) {
  switch (a.dlogits.dtype) {
    case FASTTX_F32:
      rescale<float>(a);
      return FASTTX_OK;
    case FASTTX_BF16:
      rescale<bf16>(a);
      return FASTTX_OK;
    case FASTTX_F16:
      rescale<f16>(a);
      return FASTTX_OK;
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
