// out = norm(residual + dropout(x + x_bias)), a few rows in the cache at a time.
#include "cpu/add_norm_row.h"
#include "cpu/pages.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int ROWS = 2;                 // rows whose sums run side by side
constexpr int64_t MAX_TOGETHER = 4096;  // wider rows go one by one: ROWS of them leave the cache

// Inputs of a later row, to be on their way to the cache while a row is worked on; null: none.
struct Later {
  const char *x, *residual;
};
FASTTX_INLINE void fetch(const char* row, int64_t bytes) {
  if (row) _mm_prefetch(row + bytes, _MM_HINT_T0);
}

// out = (z - mean) * rstd * weight + bias.
template <class T, bool STREAM>
FASTTX_INLINE void normalize(const Parameters& p, vf mean, vf rstd, const float* z, T* out,
                             int64_t N, const char* later) {
  auto f = [&](int64_t n) {
    fetch(later, n * sizeof(T));
    return fma((load(z + n) - mean) * rstd, load(p.weight + n), load(p.bias + n));
  };
  int64_t n = 0;
  for (; n + 2 * W <= N; n += 2 * W) store_two<STREAM, true>(out + n, f(n), f(n + W));
  for (; n < N; n += W)
    if (n + W <= N) store(out + n, f(n));
    else store_partial(out + n, f(n), (int)(N - n));
}

// The statistics of R rows z, kept for the backward, then out row by row: written side by side, rows
// of a tensor in DRAM took twice as long.
template <class T, int R>
FASTTX_INLINE void finish_rows(const Problem& p, const int64_t* row, const float* sum,
                               const float* const* z, const Later* later, bool streaming) {
  const fasttx_add_norm& a = *p.a;
  vf mean[R], rstd[R];
  FASTTX_UNROLL(2)
  for (int i = 0; i < R; i++) {
    const int64_t m = row[i];
    const float center = a.rms ? 0.0f : sum[i] / (float)p.N;
    mean[i] = set1(center);
    const float square = sum_over(p.N, [&](int64_t n) {
      fetch(later[i].x, n * sizeof(T));
      const vf d = load(z[i] + n) - mean[i];
      return d * d;
    });
    const float scale = 1.0f / __builtin_sqrtf(square / (float)p.N + (float)a.eps);
    rstd[i] = set1(scale);
    if (!a.rms) a.mean[m] = center;
    a.rstd[m] = scale;
    if (a.total.data) write_row(a.total, m, p.N, z[i]);
  }
  for (int i = 0; i < R; i++) {
    T* out = row_at<T>(a.out, row[i]);
    if (FASTTX_AVX512 && streaming)
      normalize<T, FASTTX_AVX512>(p.p, mean[i], rstd[i], z[i], out, p.N, later[i].residual);
    else normalize<T, false>(p.p, mean[i], rstd[i], z[i], out, p.N, later[i].residual);
  }
}

// z = x + r of one dtype, each side by side in memory; returns the row's sum.
template <class T, bool BOTH>
FASTTX_INLINE float add_rows(const T* x, const T* r, float* z, int64_t N) {
  const int64_t whole = N / W * W;
  float tail = 0;
  if (whole < N) {
    const int live = (int)(N - whole);
    vf v = load_partial(x + whole, live);
    if (BOTH) v += load_partial(r + whole, live);
    store(z + whole, v);
    tail = sum_lanes(v);
  }
  return tail + sum_over(whole, [&](int64_t n) {
    const vf v = BOTH ? load(x + n) + load(r + n) : load(x + n);
    store(z + n, v);
    return v;
  });
}

// ROWS rows of plain additions: no dropout, no x_bias, one dtype. Past the end the last row repeats.
template <class T>
__attribute__((noinline)) void plain_rows(const Problem& p, int64_t first, bool streaming,
                                          float* memory) {
  const fasttx_add_norm& a = *p.a;
  int64_t row[ROWS];
  float sum[ROWS];
  const float* z[ROWS];
  Later later[ROWS] = {};
  FASTTX_UNROLL(2)
  for (int i = 0; i < ROWS; i++) {
    row[i] = min64(first + i, p.M - 1);
    // 16-bit rows take longer to compute than to read: there it costs more than it saves.
    if (sizeof(T) == 4) {
      const int64_t m = min64(first + i + ROWS, p.M - 1);
      later[i].x = (const char*)row_at<T>(a.x, m);
      if (a.residual.data) later[i].residual = (const char*)row_at<T>(a.residual, m);
    }
    float* to = memory + i * p.padded;
    z[i] = to;
    const T* x = row_at<T>(a.x, row[i]);
    sum[i] = a.residual.data ? add_rows<T, true>(x, row_at<T>(a.residual, row[i]), to, p.N)
                             : add_rows<T, false>(x, nullptr, to, p.N);
  }
  finish_rows<T, ROWS>(p, row, sum, z, later, streaming);
}

template <class T>
__attribute__((noinline)) void any_row(const Problem& p, int64_t m, bool streaming, float* memory) {
  const float* z = memory;
  const Later none = {};
  sum_row(p, m, memory, (uint16_t*)(memory + p.padded));
  const float sum = p.a->rms ? 0.0f : sum_over(p.N, [&](int64_t n) { return load(z + n); });
  finish_rows<T, 1>(p, &m, &sum, &z, &none, streaming);
}

bool plain(const Problem& p) {
  const fasttx_add_norm& a = *p.a;
  return !p.dropout.threshold && !p.p.x_bias && a.x.column == 1 && a.x.dtype == a.out.dtype &&
         p.N <= MAX_TOGETHER &&
         (!a.residual.data || (a.residual.dtype == a.x.dtype && a.residual.column == 1));
}

template <class T>
int forward(const Problem& p) {
  const bool fast = plain(p);
  const bool streaming = streams<T>(p, p.a->out, p.a->residual.data ? 3 : 2);
  const int64_t rows = round_up(max64(1, 32768 / p.N), ROWS);
  const size_t bytes = (ROWS + 1) * p.padded * sizeof(float);
  int status = FASTTX_OK;
  parallel_items((p.M + rows - 1) / rows, num_workers(), [&](int64_t, int64_t item) {
    float* memory = (float*)scratch(SCRATCH_TILE, bytes);
    if (!memory) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    const int64_t end = min64(p.M, (item + 1) * rows);
    if (fast)
      for (int64_t m = item * rows; m < end; m += ROWS) plain_rows<T>(p, m, streaming, memory);
    else
      for (int64_t m = item * rows; m < end; m++) any_row<T>(p, m, streaming, memory);
    if (streaming) end_of_stream();
  });
  return status;
}

}  // namespace

int add_norm_fwd(const fasttx_add_norm& a) {
  Problem p;
  if (a.M == 0) return FASTTX_OK;
  if (a.N == 0) {
    for (int64_t m = 0; m < a.M; m++) {
      if (!a.rms) a.mean[m] = 0;
      a.rstd[m] = 1.0f / __builtin_sqrtf((float)a.eps);
    }
    return FASTTX_OK;
  }
  if (!make_problem(a, &p)) return FASTTX_NO_MEMORY;
  const fasttx_rows* outputs[] = {&a.out, &a.total};
  for (const fasttx_rows* t : outputs)
    if (t->data) prefer_large_pages(t->data, a.M * a.N * (t->dtype == FASTTX_F32 ? 4 : 2));
  switch (a.out.dtype) {
    case FASTTX_F32:
      return forward<float>(p);
    case FASTTX_BF16:
      return forward<bf16>(p);
    case FASTTX_F16:
      return forward<f16>(p);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
