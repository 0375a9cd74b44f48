// act(x W^T + bias) + residual and its gradients. In the forward the lanes are tokens, so that weights
// in their natural layout need no packing; for a few tokens the sums themselves lie in lanes.
#include "cpu/linear.h"

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/strip.h"

namespace fasttx::FASTTX_ISA {
namespace {

template <class T>
void finish(void* context, float* s, int64_t n, int64_t rows, int64_t m, int64_t lanes) {
  const fasttx_linear& a = *(const fasttx_linear*)context;
  add_bias<T>(s, rows, a.bias, n);
  if (a.keep) put_transposed<T>(s, rows, lanes, a.pre, {}, m, n);
  apply_activation(a.activation, s, nullptr, rows, (int)((lanes + W - 1) / W));
  put_transposed<T>(s, rows, lanes, a.out, a.residual, m, n);
}

// The same of a strip whose lanes are columns.
template <class T>
void finish_columns(void* context, float* s, int64_t m, int64_t rows, int64_t n, int64_t count) {
  const fasttx_linear& a = *(const fasttx_linear*)context;
  add_bias_columns<T>(s, rows, count, a.bias, n);
  if (a.keep) put_columns<T>(s, rows, count, matrix(a.pre), m, n);
  apply_activation(a.activation, s, nullptr, rows, LANES / W);
  add_columns<T>(s, rows, count, matrix(a.residual), m, n);
  put_columns<T>(s, rows, count, matrix(a.out), m, n);
}

// dpre = dout act'(pre), rounded to T.
template <class T>
void slope_rows(const fasttx_linear& a, int64_t first, int64_t M, int64_t N, T* dpre) {
  const Operand pre = matrix(a.pre), dout = matrix(a.dout);
  const int64_t together = max64(1, 16384 / max64(1, N));
  parallel_items((M + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
    with_activation(a.activation, [&](auto tag) {
      for (int64_t m = item * together; m < min64(M, (item + 1) * together); m++)
        for (int64_t n = 0; n < N; n += W) {
          const int here = (int)min64(W, N - n);
          vf y, slope;
          activate<decltype(tag)::value>(
              load_strided(element<const T>(pre, first + m, n), pre.column, here), &y, &slope);
          const vf g = load_strided(element<const T>(dout, first + m, n), dout.column, here);
          store_strided(dpre + m * N + n, 1, g * slope, here);
        }
    });
  });
}

template <class T>
int backward(const fasttx_linear& a) {
  const int64_t M = a.x.sizes[0], K = a.x.sizes[1], N = a.weight.sizes[0];
  const int64_t chunk = min64(max64(1, M), chunk_rows(max64(N, K)));
  T* dpre = nullptr;
  if (a.activation && !(dpre = (T*)scratch(SCRATCH_HEAD, chunk * N * sizeof(T) + 64)))
    return FASTTX_NO_MEMORY;
  Gradient dweight = gradient(a.dweight);
  float* sums = nullptr;
  if (M > chunk) {
    const int64_t floats = a.need & 2 ? dweight.floats() : 0;
    sums = (float*)scratch(SCRATCH_TILE, (floats + N) * 4);
    if (!sums) return FASTTX_NO_MEMORY;
    if (floats) dweight.sum = sums + N;
  }
  int status = FASTTX_OK;
  for (int64_t m = 0; (m < M || m == 0) && status == FASTTX_OK; m += chunk) {
    const int64_t n = min64(chunk, M - m);
    const bool first = m == 0, last = m + chunk >= M;
    Operand g = from_row(matrix(a.dout), m);
    if (a.activation) {
      slope_rows<T>(a, m, n, N, dpre);
      g = {dpre, a.x.dtype, N, 1};
    }
    if (a.need & 1) {
      const Term term = {g, transposed(matrix(a.weight)), N};
      const Operand dx = from_row(matrix(a.dx), m);
      status = multiply_into(&term, 1, n, K,
                             {(void*)dx.data, dx.dtype, dx.row, dx.column, nullptr, true, true});
    }
    if (a.need & 2 && status == FASTTX_OK)
      status = dweight.add(g, from_row(matrix(a.x), m), n, first, last);
    if (a.need & 4 && status == FASTTX_OK)
      status = add_rows(g, n, N, {a.dbias.data, a.dbias.dtype, 0, a.dbias.strides[0], sums, first, last});
  }
  return status;
}

}  // namespace

int linear_fwd(const fasttx_linear& a) {
  const int64_t M = a.x.sizes[0], K = a.x.sizes[1], N = a.weight.sizes[0];
  int status = FASTTX_OK;
  with_type(a.x.dtype, [&](auto t) {
    typedef decltype(t) T;
    if (a.out.strides[0] == N && a.out.strides[1] == 1 && !freed_pages_leave())
      prefer_large_pages(a.out.data, M * N * sizeof(T));
    const bool turned = a.weight.strides[0] == 1 && a.weight.strides[1] != 1;
    if (turned ? M <= TURNED_FEW : M <= FEW && N >= FEWEST && a.weight.strides[1] == 1) {
      const Term term = {matrix(a.x), matrix(a.weight), K};
      status = multiply(&term, 1, M, N, finish_columns<T>, (void*)&a);
    } else {
      const Term term = {matrix(a.weight), matrix(a.x), K};
      status = multiply(&term, 1, N, M, finish<T>, (void*)&a);
    }
  });
  return status;
}

int linear_bwd(const fasttx_linear& a) {
  int status = FASTTX_OK;
  with_type(a.x.dtype, [&](auto t) { status = backward<decltype(t)>(a); });
  return status;
}

}  // namespace fasttx::FASTTX_ISA
