#include "cpu/softmax_columns.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int64_t STRIP_BYTES = 128 << 10;  // of logits held by a strip of rows

// A lane's sum goes over many numbers: RUN of them go to one of SUMS parts, which shortens the chains.
constexpr int64_t RUN = 8, SUMS = 16;
FASTTX_INLINE vf add_up(vf* sums) {
  for (int64_t n = SUMS / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; i++) sums[i] += sums[i + n];
  return sums[0];
}

// Up to `vectors` * W neighbouring rows, lane 0 being row r.
struct Strip {
  Row r;
  int64_t rows;
  int vectors;
};

// f(strip) for all rows, `vectors` vectors of them at once.
template <class F>
void each_strip(const Problem& p, int lanes, int vectors, const F& f) {
  const int64_t* n = p.a->x.sizes;
  int64_t outer[3] = {n[0], n[1], n[2]};
  outer[lanes] = 1;
  const int64_t step = vectors * W, strips = (n[lanes] + step - 1) / step;
  parallel_items(outer[0] * outer[1] * outer[2] * strips, num_workers(), [&](int64_t, int64_t item) {
    Strip s = {row_at(outer, item / strips), 0, 0};
    s.r.i[lanes] = item % strips * step;
    s.rows = min64(step, n[lanes] - s.r.i[lanes]);
    s.vectors = (int)((s.rows + W - 1) / W);
    f(s);
  });
}

int vectors_of(const Problem& p) {
  const int64_t fit = STRIP_BYTES / max64(1, p.N * W * (int64_t)sizeof(float));
  return (int)max64(1, min64(4, fit));
}

// scale * x + mask of column n, rows of vector v.
template <class T, class E>
void read_logits(const Problem& p, const Strip& s, int lanes, float* t) {
  const fasttx_softmax& a = *p.a;
  const vf scale = set1((float)a.scale);
  const T* x = address<T>(a.x, s.r);
  const E* m = a.mask.data ? address<E>(a.mask, s.r) : nullptr;
  const int64_t step = a.mask.strides[lanes];
  for (int64_t n = 0; n < p.N; n++)
    for (int v = 0; v < s.vectors; v++) {
      const int rest = (int)min64(W, s.rows - v * W);
      vf z = load_strided(x + n * a.x.strides[3] + v * W, 1, rest);
      z = m ? add_mask(z, scale, load_mask(m + n * a.mask.strides[3] + v * W * step, step, rest))
            : z * scale;
      store(t + (n * s.vectors + v) * W, z);
    }
}
// Hides what lies beyond the causal edge.
void hide(const Problem& p, const Strip& s, int lanes, float* t) {
  for (int v = 0; v < s.vectors; v++) {
    const vi row = (lanes == 2 ? lane_index() + v * W : vi{}) + (int)(s.r.i[2] + p.offset + 1);
    for (int64_t n = 0; n < p.N; n++) {
      float* at = t + (n * s.vectors + v) * W;
      store(at, select(less(set1i((int)n), row), load(at), set1(-INF)));
    }
  }
}

template <class T>
void forward(const Problem& p, const Strip& s, int lanes, float* t) {
  const fasttx_softmax& a = *p.a;
  if (a.mask.data)
    with_mask_type(a.mask.dtype, [&](auto e) { read_logits<T, decltype(e)>(p, s, lanes, t); });
  else read_logits<T, float>(p, s, lanes, t);
  if (a.causal) hide(p, s, lanes, t);
  T* out = address<T>(a.out, s.r);
  const vf log2e = set1(LOG2E);
  for (int v = 0; v < s.vectors; v++) {
    const int rest = (int)min64(W, s.rows - v * W);
    float* at = t + v * W;
    T* to = out + v * W;
    const int64_t step = s.vectors * W;
    vf top = set1(-INF), sums[SUMS] = {};
    for (int64_t n = 0; n < p.N; n++) top = max(load(at + n * step), top);
    top = select(equal(top, set1(-INF)), vf{}, top);
    for (int64_t n = 0; n < p.N; n++) {
      const vf z = load(at + n * step) - top, e = exp2<6>(z * log2e);
      sums[n / RUN % SUMS] += e;
      store(at + n * step, a.log ? z : e);
    }
    const vf sum = add_up(sums);
    const vmask none = equal(sum, vf{});
    const vf log_sum = select(none, set1(INF), log2(sum) * set1(LN2));
    const vf inverse = select(none, vf{}, set1(1.0f) / sum);
    for (int64_t n = 0; n < p.N; n++) {
      const vf z = load(at + n * step);
      store_strided(to + n * a.out.strides[3], 1, a.log ? z - log_sum : z * inverse, rest);
    }
  }
}

template <class T>
void backward(const Problem& p, const Strip& s, int lanes) {
  const fasttx_softmax& a = *p.a;
  const T* y = address<T>(a.out, s.r);
  T* dx = address<T>(a.dx, s.r);
  const vf scale = set1((float)a.scale), none = set1(a.log ? -INF : 0.0f);
  with_type(a.dout.dtype, [&](auto type) {
    typedef decltype(type) U;
    const int64_t step = a.dout.strides[lanes];
    for (int v = 0; v < s.vectors; v++) {
      const int rest = (int)min64(W, s.rows - v * W);
      const T* from = y + v * W;
      const U* up = address<U>(a.dout, s.r) + v * W * step;
      const auto upstream = [&](int64_t n) {
        const U* at = up + n * a.dout.strides[3];
        return step == 0 ? set1(to_float(*at)) : load_strided(at, step, rest);
      };
      const auto result = [&](int64_t n) {
        return load_strided(from + n * a.out.strides[3], 1, rest);
      };
      vf sums[SUMS] = {};
      for (int64_t n = 0; n < p.N; n++) {
        const vf z = result(n), g = upstream(n);
        sums[n / RUN % SUMS] += zero_unless(mask_not(equal(z, none)), a.log ? g : g * z);
      }
      const vf sum = add_up(sums);
      for (int64_t n = 0; n < p.N; n++) {
        const vf z = result(n), g = upstream(n);
        const vf d = a.log ? fnma(exp2<6>(z * set1(LOG2E)), sum, g) : z * (g - sum);
        store_strided(dx + v * W + n * a.dx.strides[3], 1,
                      zero_unless(mask_not(equal(z, none)), d * scale), rest);
      }
    }
  });
}

}  // namespace

int softmax_columns_fwd(const fasttx_softmax& a, int lanes) {
  const Problem p = make_problem(a);
  const int vectors = vectors_of(p);
  int status = FASTTX_OK;
  each_strip(p, lanes, vectors, [&](const Strip& s) {
    float* t = (float*)scratch(SCRATCH_TILE, p.N * s.vectors * W * sizeof(float));
    if (!t) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    with_type(a.x.dtype, [&](auto type) { forward<decltype(type)>(p, s, lanes, t); });
  });
  return status;
}

int softmax_columns_bwd(const fasttx_softmax& a, int lanes) {
  const Problem p = make_problem(a);
  each_strip(p, lanes, 4, [&](const Strip& s) {
    with_type(a.out.dtype, [&](auto type) { backward<decltype(type)>(p, s, lanes); });
  });
  return FASTTX_OK;
}

}  // namespace fasttx::FASTTX_ISA
