// out = dropout(norm(scale * token + position + segment)), one row in the cache at a time.
#include "cpu/embed_row.h"

namespace fasttx::FASTTX_ISA {
namespace {

// f(n) for every vector of the row, to out.
template <class T, class F>
FASTTX_INLINE void write(T* out, int64_t N, const F& f) {
  int64_t n = 0;
  for (; n + W <= N; n += W) store(out + n, f(n));
  if (n < N) store_partial(out + n, f(n), (int)(N - n));
}

template <class T, bool NORM, bool DROPOUT>
FASTTX_INLINE void finish_row(const Embedding& e, Moments row, const float* z,
                              const uint16_t* numbers, T* out) {
  const vf mean = set1(row.mean), rstd = set1(row.rstd), scale = set1(e.dropout.keep_scale);
  write(out, e.N, [&](int64_t n) {
    vf y = load(z + n);
    if (NORM) y = fma((y - mean) * rstd, load(e.p.weight + n), load(e.p.bias + n));
    if (DROPOUT) y = zero_unless(keep_columns(numbers + n, e.dropout.threshold), y * scale);
    return y;
  });
}

template <class T>
FASTTX_NOINLINE void row(const Embedding& e, int64_t m, float* z, uint16_t* numbers) {
  const fasttx_embed& a = *e.a;
  const float sum = embed_row(e, m, z);
  T* out = row_at<T>(a.out, m);
  const bool drop = e.dropout.threshold;
  if (drop) philox_row(e.dropout, e.N, (uint32_t)m, 0, 0, numbers);
  Moments found = {};
  if (a.norm) {
    found = row_moments(z, sum, e.N, e.rms, (float)a.eps);
    if (a.mean) a.mean[m] = found.mean;
    a.rstd[m] = found.rstd;
    if (drop) finish_row<T, true, true>(e, found, z, numbers, out);
    else finish_row<T, true, false>(e, found, z, numbers, out);
  } else if (drop) {
    finish_row<T, false, true>(e, found, z, numbers, out);
  } else {
    finish_row<T, false, false>(e, found, z, numbers, out);
  }
}

template <class T>
int forward(const Embedding& e) {
  const int64_t together = max64(1, 32768 / e.N);
  const size_t bytes = e.padded * (sizeof(float) + sizeof(uint16_t));
  int status = FASTTX_OK;
  parallel_items((e.M + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
    float* z = (float*)scratch(SCRATCH_TILE, bytes);
    if (!z) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    const int64_t end = min64(e.M, (item + 1) * together);
    for (int64_t m = item * together; m < end; m++) {
      prefetch_row(e, m + AHEAD);
      row<T>(e, m, z, (uint16_t*)(z + e.padded));
    }
  });
  return status;
}

}  // namespace

int embed_fwd(const fasttx_embed& a) {
  Embedding e = {};
  if (a.M == 0) return FASTTX_OK;
  if (a.N == 0) {
    for (int64_t m = 0; m < a.M; m++) {
      if (a.mean) a.mean[m] = 0;
      if (a.rstd) a.rstd[m] = 1.0f / __builtin_sqrtf((float)a.eps);
    }
    return FASTTX_OK;
  }
  if (!make_embedding(a, &e)) return FASTTX_NO_MEMORY;
  switch (a.out.dtype) {
    case FASTTX_F32:
      return forward<float>(e);
    case FASTTX_BF16:
      return forward<bf16>(e);
    case FASTTX_F16:
      return forward<f16>(e);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
