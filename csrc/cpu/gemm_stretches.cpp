// A few rows times b whose rows lie side by side (weights kept transposed): b is read as it lies, a
// long stretch of lanes for each k, with the sums in the first level cache. Packing b first cost up to
// three times the reading. And sums of few outer products, written as they lie, a row after the other.
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/stream.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int64_t STRETCH = 2048;
constexpr int TOGETHER = 4;  // of k: the sums are read and written once for so many

// sum [ROWS][STRETCH] += columns k .. k + COUNT - 1 of a, times those of b.
template <class T, int ROWS, int COUNT>
FASTTX_INLINE void add_columns(float* sum, const Broadcast& a, int64_t k, const T* b, int64_t step,
                               int64_t lanes) {
  vf x[ROWS][COUNT];
  FASTTX_UNROLL(3)
  for (int r = 0; r < ROWS; r++) {
    FASTTX_UNROLL(4)
    for (int i = 0; i < COUNT; i++) x[r][i] = set1(a.data[r * a.row + k + i]);
  }
  b += k * step;
  auto add = [&](int64_t l, const vf* w) {
    FASTTX_UNROLL(3)
    for (int r = 0; r < ROWS; r++) {
      vf s = load(sum + r * STRETCH + l);
      FASTTX_UNROLL(4)
      for (int i = 0; i < COUNT; i++) s = fma(x[r][i], w[i], s);
      store(sum + r * STRETCH + l, s);
    }
  };
  vf w[COUNT];
  int64_t l = 0;
  for (; l + W <= lanes; l += W) {
    FASTTX_UNROLL(4)
    for (int i = 0; i < COUNT; i++) w[i] = load(b + i * step + l);
    add(l, w);
  }
  if (l == lanes) return;
  for (int i = 0; i < COUNT; i++) w[i] = load_partial(b + i * step + l, (int)(lanes - l));
  add(l, w);
}

template <class T, int ROWS>
FASTTX_NOINLINE void add_stretch(float* sum, const Broadcast& a, const T* b, int64_t step,
                                 int64_t lanes, int64_t K) {
  int64_t k = 0;
  for (; k + TOGETHER <= K; k += TOGETHER) add_columns<T, ROWS, TOGETHER>(sum, a, k, b, step, lanes);
  for (; k < K; k++) add_columns<T, ROWS, 1>(sum, a, k, b, step, lanes);
}

Broadcast wide_rows(const Operand& a, int64_t I, int64_t K, float* memory) {
  with_type(a.dtype, [&](auto t) {
    typedef decltype(t) T;
    for (int64_t i = 0; i < I; i++)
      for (int64_t k = 0; k < K; k++) memory[i * K + k] = to_float(*element<const T>(a, i, k));
  });
  return {memory, K};
}

// out [J] = sum over m of a[m] b[m * J + j].
template <class T, bool STREAM>
FASTTX_NOINLINE void outer_row(T* out, const float* a, const float* b, int64_t M, int64_t J) {
  int64_t j = 0;
  for (; j + 4 * W <= J; j += 4 * W) {
    vf c[4] = {};
    for (int64_t m = 0; m < M; m++) {
      const vf x = set1(a[m]);
      FASTTX_UNROLL(4)
      for (int u = 0; u < 4; u++) c[u] = fma(x, load(b + m * J + j + u * W), c[u]);
    }
    store_two<STREAM, true>(out + j, c[0], c[1]);
    store_two<STREAM, true>(out + j + 2 * W, c[2], c[3]);
  }
  for (; j < J; j += W) {
    const int here = (int)min64(W, J - j);
    vf c = {};
    for (int64_t m = 0; m < M; m++) c = fma(set1(a[m]), load_partial(b + m * J + j, here), c);
    store_partial(out + j, c, here);
  }
}

}  // namespace

int add_outer(const Operand& a, const Operand& b, int64_t M, int64_t I, int64_t J, const Operand& out) {
  float* memory = (float*)scratch(SCRATCH_SHARED, M * (I + J) * 4 + 64);
  if (!memory) return FASTTX_NO_MEMORY;
  const Broadcast x = wide_rows(b, M, J, memory);
  float* y = memory + M * J;
  with_type(out.dtype, [&](auto t) {
    typedef decltype(t) T;
    for (int64_t i = 0; i < I; i++)
      for (int64_t m = 0; m < M; m++) y[i * M + m] = to_float(*element<const T>(a, m, i));
    const int64_t edges = ((int64_t)out.data | out.row * (int64_t)sizeof(T)) % 64;
    const bool past_cache = FASTTX_AVX512 && edges == 0 && I * J * (int64_t)sizeof(T) >= cache_bytes();
    const int64_t together = max64(1, 65536 / J);
    parallel_items((I + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
      for (int64_t i = item * together; i < min64(I, (item + 1) * together); i++) {
        T* row = element<T>(out, i, 0);
        if (past_cache) outer_row<T, true>(row, y + i * M, x.data, M, J);
        else outer_row<T, false>(row, y + i * M, x.data, M, J);
      }
      if (past_cache) end_of_stream();
    });
  });
  return FASTTX_OK;
}

int multiply_stretches(const Term& term, int64_t I, int64_t J, Epilogue epilogue, void* context) {
  const int64_t K = term.K;
  float* memory = (float*)scratch(SCRATCH_SHARED, I * K * 4 + 64);
  if (!memory) return FASTTX_NO_MEMORY;
  const Broadcast a = wide_rows(term.a, I, K, memory);
  const int64_t workers = num_workers();
  const int64_t stretch = min64(STRETCH, round_up((J + workers - 1) / workers, LANES));
  bool failed = false;
  parallel_items((J + stretch - 1) / stretch, workers, [&](int64_t, int64_t item) {
    float* sum = (float*)scratch(SCRATCH_PACK, 2 * I * STRETCH * 4);
    if (!sum) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    float* part = sum + I * STRETCH;
    const int64_t j = item * stretch, lanes = min64(stretch, J - j);
    __builtin_memset(sum, 0, I * STRETCH * 4);
    for (int64_t k = 0; k < K; k += CHAIN) {
      const Broadcast x = {a.data + k, a.row};
      const int64_t here = min64(CHAIN, K - k);
      __builtin_memset(part, 0, I * STRETCH * 4);
      with_type(term.b.dtype, [&](auto t) {
        typedef decltype(t) T;
        const T* b = element<const T>(term.b, j, k);
        if (I == 1) add_stretch<T, 1>(part, x, b, term.b.column, lanes, here);
        else if (I == 2) add_stretch<T, 2>(part, x, b, term.b.column, lanes, here);
        else add_stretch<T, 3>(part, x, b, term.b.column, lanes, here);
      });
      for (int64_t l = 0; l < I * STRETCH; l += W) store(sum + l, load(sum + l) + load(part + l));
    }
    alignas(64) float c[FEW_STRETCHES * LANES];
    for (int64_t l = 0; l < lanes; l += LANES) {
      for (int64_t i = 0; i < I; i++)
        __builtin_memcpy(c + i * LANES, sum + i * STRETCH + l, LANES * 4);
      epilogue(context, c, 0, I, j + l, min64(LANES, lanes - l));
    }
  });
  return failed ? FASTTX_NO_MEMORY : FASTTX_OK;
}

}  // namespace fasttx::FASTTX_ISA
