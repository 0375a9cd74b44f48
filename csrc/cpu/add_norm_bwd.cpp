// Gradients of out = norm(z), z = residual + dropout(x + x_bias), z computed again from the inputs.
//
// dz = rstd * (g w - mean(g w) - xhat mean(g w xhat)) + dtotal, without the first mean for rms.
// The rows are cut into parts, a function of the shape alone; each part sums its parameter
// gradients over groups of GROUP rows, then over groups, and the parts are added in order.
#include <string.h>

#include "cpu/add_norm_row.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int AHEAD = 1;  // rows
constexpr int GROUP = 8;  // rows summed before the part's own sums are touched
constexpr int64_t MAX_PARTS = 64, MAX_PART_FLOATS = 1 << 22;
enum { DX = 1, DRESIDUAL = 2, DWEIGHT = 4, DBIAS = 8, DX_BIAS = 16 };

// Sums kept by one part: weight, bias, x_bias gradients, those that are needed.
struct Sums {
  float *weight, *bias, *x_bias;
};

struct Backward : Problem {
  bool rms;
  int need, kinds;
  int64_t parts, part_rows;
  float* partials;  // [parts][kinds][padded]

  Sums sums(float* memory) const {
    Sums s = {};
    if (need & DWEIGHT) s.weight = memory, memory += padded;
    if (need & DBIAS) s.bias = memory, memory += padded;
    if (need & DX_BIAS) s.x_bias = memory;
    return s;
  }
};

// One row at a time: several rows' buffers crowd the first cache, and a tensor in DRAM then took twice
// as long.
struct Row {
  float *xhat, *g, *d, *unused, *group;
  uint16_t* numbers;
};

void gradient_row(const Backward& p, int64_t m, const Row& r, const Sums& s) {
  const fasttx_add_norm& a = *p.a;
  const int64_t N = p.N;
  float *xhat = r.xhat, *g = r.g, *d = r.d;
  sum_row(p, m, xhat, r.numbers);
  if (!a.dout.data) memset(g, 0, p.padded * sizeof(float));
  else read_row<false>(a.dout, m, N, g);
  const vf mean = set1(p.rms ? 0.0f : a.mean[m]), rstd = set1(a.rstd[m]);
  float* dweight = s.weight ? s.weight : r.unused;
  float* dbias = s.bias ? s.bias : r.unused;
  vf along[2] = {}, across[2] = {};
  // d holds g w first: rounded once, so that g w and its mean cancel where they are equal.
  auto add = [&](int64_t n, int i) {
    const vf upstream = load(g + n), x = (load(xhat + n) - mean) * rstd;
    const vf gw = upstream * load(p.p.weight + n);
    store(xhat + n, x);
    store(d + n, gw);
    store(dweight + n, fma(upstream, x, load(dweight + n)));
    store(dbias + n, load(dbias + n) + upstream);
    along[i] += gw;
    across[i] = fma(gw, x, across[i]);
  };
  int64_t n = 0;
  for (; n + 2 * W <= N; n += 2 * W) add(n, 0), add(n + W, 1);
  for (; n < N; n += W) add(n, 0);
  if (!(p.need & (DX | DRESIDUAL | DX_BIAS))) return;
  const vf c1 = set1(p.rms ? 0.0f : sum_lanes(along[0] + along[1]) / (float)N);
  const vf c2 = set1(sum_lanes(across[0] + across[1]) / (float)N);
  for (n = 0; n < N; n += W) store(d + n, (load(d + n) - fma(load(xhat + n), c2, c1)) * rstd);
  if (a.dtotal.data) read_row<true>(a.dtotal, m, N, d);
  if (p.need & DRESIDUAL) write_row(a.dresidual, m, N, d);
  if (p.dropout.threshold) drop_row(p.dropout, r.numbers, N, d);
  if (p.need & DX) write_row(a.dx, m, N, d);
  if (s.x_bias)
    for (n = 0; n < N; n += W) store(s.x_bias + n, load(s.x_bias + n) + load(d + n));
}

// What comes in and goes out has one dtype, side by side in memory, and is only added.
bool plain(const Backward& p) {
  const fasttx_add_norm& a = *p.a;
  const fasttx_rows* rows[] = {&a.residual, &a.dout, &a.dtotal};
  for (const fasttx_rows* t : rows)
    if (t->data && (t->dtype != a.x.dtype || t->column != 1)) return false;
  return !p.dropout.threshold && !p.p.x_bias && !(p.need & DX_BIAS) && a.dout.data &&
         a.x.column == 1 && (!(p.need & DX) || a.dx.column == 1) &&
         (!(p.need & DRESIDUAL) || (a.dresidual.dtype == a.x.dtype && a.dresidual.column == 1));
}

// g w, rounded once: it and its mean cancel where they are equal.
FASTTX_INLINE vf times(vf g, vf w) {
  vf product = g * w;
  asm("" : "+x"(product));
  return product;
}

// gradient_row for such tensors: they are read twice, the second time from the cache. A buffer more
// for what could be kept between would share its cache sets with them where rows are 4 KiB.
template <class T, bool BOTH, bool STREAM>
FASTTX_NOINLINE void plain_row(const Backward& p, int64_t m, const Row& r, const Sums& s) {
  const fasttx_add_norm& a = *p.a;
  const int64_t N = p.N, whole = N / W * W;
  const int live = (int)(N - whole);
  const T* x = row_at<T>(a.x, m);
  const T* residual = BOTH ? row_at<T>(a.residual, m) : nullptr;
  const T* dout = row_at<T>(a.dout, m);
  const vf mean = set1(p.rms ? 0.0f : a.mean[m]), rstd = set1(a.rstd[m]);
  float* dweight = s.weight ? s.weight : r.unused;
  float* dbias = s.bias ? s.bias : r.unused;
  auto xhat = [&](int64_t n) {
    const vf z = BOTH ? load(x + n) + load(residual + n) : load(x + n);
    return (z - mean) * rstd;
  };
  auto last_xhat = [&] {
    vf z = load_partial(x + whole, live);
    if (BOTH) z += load_partial(residual + whole, live);
    return (z - mean) * rstd;
  };
  vf along[2] = {}, across[2] = {};
  auto add = [&](int64_t n, int i, vf xh, vf upstream) {
    const vf product = times(upstream, load(p.p.weight + n));
    store(dweight + n, fma(upstream, xh, load(dweight + n)));
    store(dbias + n, load(dbias + n) + upstream);
    along[i] += product;
    across[i] = fma(product, xh, across[i]);
  };
  const int64_t later = min64(m + AHEAD, p.M - 1);
  const char* next[] = {(const char*)row_at<T>(a.x, later), (const char*)row_at<T>(a.dout, later),
                        BOTH ? (const char*)row_at<T>(a.residual, later) : nullptr};
  auto fetch = [&](int64_t n, int i) {
    if (next[i]) _mm_prefetch(next[i] + n * sizeof(T), _MM_HINT_T0);
  };
  int64_t n = 0;
  for (; n + 2 * W <= whole; n += 2 * W) {
    fetch(n, 0), fetch(n, 1);
    add(n, 0, xhat(n), load(dout + n));
    if (sizeof(T) == 4) fetch(n + W, 0), fetch(n + W, 1);
    add(n + W, 1, xhat(n + W), load(dout + n + W));
  }
  for (; n < whole; n += W) add(n, 0, xhat(n), load(dout + n));
  if (live) add(whole, 1, last_xhat(), load_partial(dout + whole, live));
  if (!(p.need & (DX | DRESIDUAL))) return;
  const vf c1 = set1(p.rms ? 0.0f : sum_lanes(along[0] + along[1]) / (float)N);
  const vf c2 = set1(sum_lanes(across[0] + across[1]) / (float)N);
  T* dx = p.need & DX ? row_at<T>(a.dx, m) : nullptr;
  T* dresidual = p.need & DRESIDUAL ? row_at<T>(a.dresidual, m) : nullptr;
  if (!dx) dx = dresidual, dresidual = nullptr;
  const T* dtotal = a.dtotal.data ? row_at<T>(a.dtotal, m) : nullptr;
  auto d = [&](int64_t n, vf xh, vf upstream) {
    return (times(upstream, load(p.p.weight + n)) - fma(xh, c2, c1)) * rstd;
  };
  n = 0;
  if (!dtotal && !dresidual)
    for (; n + 2 * W <= whole; n += 2 * W) {
      fetch(n, 2);
      if (sizeof(T) == 4) fetch(n + W, 2);
      store_two<STREAM, true>(dx + n, d(n, xhat(n), load(dout + n)),
                        d(n + W, xhat(n + W), load(dout + n + W)));
    }
  for (; n < whole; n += W) {
    vf v = d(n, xhat(n), load(dout + n));
    if (dtotal) v += load(dtotal + n);
    store(dx + n, v);
    if (dresidual) store(dresidual + n, v);
  }
  if (!live) return;
  vf v = d(whole, last_xhat(), load_partial(dout + whole, live));
  if (dtotal) v += load_partial(dtotal + whole, live);
  store_partial(dx + whole, v, live);
  if (dresidual) store_partial(dresidual + whole, v, live);
}

typedef void (*RowFunction)(const Backward&, int64_t, const Row&, const Sums&);

RowFunction row_function(const Backward& p) {
  RowFunction f = gradient_row;
  if (plain(p))
    with_type(p.a->x, [&](auto type) {
      typedef decltype(type) T;
      const bool both = p.a->residual.data;
      f = both ? plain_row<T, true, false> : plain_row<T, false, false>;
#if FASTTX_AVX512
      if (p.need & DX && streams<T>(p, p.a->dx, both ? 4 : 3))
        f = both ? plain_row<T, true, true> : plain_row<T, false, true>;
#endif
    });
  return f;
}

void part(const Backward& p, int64_t index, const Row& r) {
  const int64_t floats = p.kinds * p.padded, begin = index * p.part_rows;
  const int64_t end = min64(p.M, begin + p.part_rows);
  float* total = p.partials + index * floats;
  memset(total, 0, floats * sizeof(float));
  memset(r.unused, 0, p.padded * sizeof(float));
  const Sums group = p.sums(r.group);
  const RowFunction row = row_function(p);
  for (int64_t first = begin; first < end; first += GROUP) {
    memset(r.group, 0, floats * sizeof(float));
    for (int64_t m = first; m < min64(end, first + GROUP); m++) row(p, m, r, group);
    for (int64_t n = 0; n < floats; n += W) store(total + n, load(total + n) + load(r.group + n));
  }
  end_of_stream();
}

void finish(const Backward& p) {
  const fasttx_add_norm& a = *p.a;
  const int64_t floats = p.kinds * p.padded;
  float* total = p.partials;
  for (int64_t i = 1; i < p.parts; i++)
    for (int64_t n = 0; n < floats; n += W)
      store(total + n, load(total + n) + load(total + i * floats + n));
  const Sums s = p.sums(total);
  if (s.weight) write_row(a.dweight, 0, p.N, s.weight);
  if (s.bias) write_row(a.dbias, 0, p.N, s.bias);
  if (s.x_bias) write_row(a.dx_bias, 0, p.N, s.x_bias);
}

}  // namespace

int add_norm_bwd(const fasttx_add_norm& a) {
  Backward p = {};
  if (a.N == 0) return FASTTX_OK;
  if (!make_problem(a, &p)) return FASTTX_NO_MEMORY;
  p.rms = a.rms;
  p.need = a.need;
  p.kinds = !!(a.need & DWEIGHT) + !!(a.need & DBIAS) + !!(a.need & DX_BIAS);
  const int64_t floats = p.kinds * p.padded;
  const int64_t most = max64(1, min64(MAX_PARTS, MAX_PART_FLOATS / max64(1, floats)));
  p.part_rows = p.M > GROUP ? round_up((p.M + most - 1) / most, GROUP) : max64(1, p.M);
  p.parts = max64(1, (p.M + p.part_rows - 1) / p.part_rows);
  p.partials = (float*)scratch(SCRATCH_PACK, p.parts * floats * sizeof(float) + 64);
  if (!p.partials) return FASTTX_NO_MEMORY;
  int status = FASTTX_OK;
  parallel_items(p.parts, num_workers(), [&](int64_t, int64_t index) {
    const int64_t n = p.padded;
    float* memory =
        (float*)scratch(SCRATCH_TILE, (4 * n + floats) * sizeof(float) + n * sizeof(uint16_t));
    if (!memory) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    float* group = memory + 4 * n;
    part(p, index,
         {memory, memory + n, memory + 2 * n, memory + 3 * n, group, (uint16_t*)(group + floats)});
  });
  if (status == FASTTX_OK) finish(p);
  return status;
}

}  // namespace fasttx::FASTTX_ISA
