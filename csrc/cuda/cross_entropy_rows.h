// A row of logits by a block: its statistics in one sweep, its gradient in another.
#pragma once
#include "cuda/cross_entropy.h"

namespace fasttx {

struct RowStatistics {
  float peak, log_sum, term;  // term: the cross-entropy, not normalized
};

// The same in every thread. scratch: 96 floats of shared memory.
FASTTX_DEVICE RowStatistics row_statistics(const CrossEntropy& p, const uint16_t* row,
                                           int64_t stride, int64_t target, float* scratch) {
  const fasttx_cross_entropy& a = p.a;
  const bool smooth = a.label_smoothing != 0;
  // Sums of differences to a number of the row keep their digits where logits are large.
  float pivot = smooth ? load1(row, a.logits.dtype, 0) : 0.0f;
  if (!(fabsf(pivot) < INFINITY)) pivot = 0.0f;
  float peak = -INFINITY, sum = 0.0f, rest = 0.0f;
  auto raise = [&](float to) {
    if (to > peak) {
      sum *= exp2_approx((peak - to) * LOG2E);
      peak = to;
    }
  };
  auto add = [&](int n, float x) {
    sum += exp2_approx((x - (peak == -INFINITY ? 0.0f : peak)) * LOG2E);
    if (smooth) rest += weight_of(p, n) * (x - pivot);
  };
  sweep<4>(
      row, a.logits.dtype, stride, p.V, stride == 1,
      [&](int n, const float(&x)[8]) {
        float largest = x[0];
#pragma unroll
        for (int i = 1; i < 8; i++) largest = fmaxf(largest, x[i]);
        raise(largest);
#pragma unroll
        for (int i = 0; i < 8; i++) add(n + i, x[i]);
      },
      [&](int n, float x) {
        raise(x);
        add(n, x);
      });
  RowStatistics s;
  s.peak = block_max(peak, scratch);
  if (s.peak == -INFINITY) s.peak = 0.0f;
  float sums[2] = {peak == -INFINITY ? sum : sum * exp2_approx((peak - s.peak) * LOG2E), rest};
  block_sum(sums, scratch);
  s.log_sum = logf(sums[0]);

  const float share = static_cast<float>(a.label_smoothing) / p.V;
  const bool inside = target >= 0 && target < p.V;
  const float x = inside ? load1(row, a.logits.dtype, target * stride) : NAN;
  s.term = static_cast<float>(1 - a.label_smoothing) * (inside ? weight_of(p, target) : 1.0f) *
           (s.peak - x + s.log_sum);
  if (smooth) {
    const float all = p.weight_sum ? *p.weight_sum : static_cast<float>(p.V);
    s.term += share * (all * (s.peak - pivot + s.log_sum) - sums[1]);
  }
  return s;
}

// gradient = d sum(dloss * loss) / d row; where the rows are one, each element is read before it is
// written by the same thread.
FASTTX_DEVICE void row_gradient(const CrossEntropy& p, uint16_t* gradient, int64_t gradient_stride,
                                const uint16_t* row, int64_t stride, int64_t target, float peak,
                                float log_sum, float up, float up_z) {
  const fasttx_cross_entropy& a = p.a;
  const int dtype = a.logits.dtype;
  const float share = static_cast<float>(a.label_smoothing) / p.V;
  const bool inside = target >= 0 && target < p.V;
  const float keep =
      static_cast<float>(1 - a.label_smoothing) * (inside ? weight_of(p, target) : 1.0f);
  const float all = p.weight_sum ? *p.weight_sum : static_cast<float>(p.V);
  float rise =
      up * (keep + share * all) + 2.0f * static_cast<float>(a.z_loss) * (peak + log_sum) * up_z;
  if (!inside) rise = NAN;
  const float base = log_sum * LOG2E;
  auto value = [&](int n, float x) {
    float d = rise * exp2_approx(fmaf(x - peak, LOG2E, -base));
    if (share != 0.0f) d -= up * share * weight_of(p, n);
    return n == target ? d - up * keep : d;
  };
  const bool alike =
      stride == 1 && gradient_stride == 1 &&
      (reinterpret_cast<uintptr_t>(gradient) ^ reinterpret_cast<uintptr_t>(row)) % 16 == 0;
  sweep<4>(
      row, dtype, stride, p.V, alike,
      [&](int n, const float(&x)[8]) {
        float d[8];
#pragma unroll
        for (int i = 0; i < 8; i++) d[i] = value(n + i, x[i]);
        store16(gradient + n, pack8(d, dtype));
      },
      [&](int n, float x) { store1(gradient, dtype, n * gradient_stride, value(n, x)); });
}

// What an ignored row gets, unread.
FASTTX_DEVICE void row_zero(uint16_t* gradient, int64_t stride, int V) {
  int lead = V, vectors = 0;
  if (stride == 1) {
    lead = min(V, static_cast<int>((16 - reinterpret_cast<uintptr_t>(gradient) % 16) % 16 / 2));
    vectors = (V - lead) / 8;
  }
  for (int i = threadIdx.x; i < vectors; i += blockDim.x)
    store16(gradient + lead + i * 8, Words{{0, 0, 0, 0}});
  for (int i = threadIdx.x; i < V - 8 * vectors; i += blockDim.x)
    store(gradient + (i < lead ? i : i + 8 * vectors) * stride, uint16_t{0});
}

}  // namespace fasttx
