// The register tiles of the attention forward: S^T = K Q^T, O^T = V^T P^T, and the exponential
// between them.
#pragma once
#include "cpu/attention.h"

namespace fasttx::FASTTX_ISA {
namespace {

#if FASTTX_AVX512
constexpr int NQ = 4;        // vectors of queries in a block
constexpr int NK = 6;        // keys (or value columns) in a register tile of NQ vectors
constexpr int NK_TWO = 8;    // in a tile of two or three
constexpr int NK_ONE = 16;   // in a tile of one
constexpr int BLOCK = 192;   // keys between two updates of the maximum
#elif FASTTX_AVX2
constexpr int NQ = 2, NK = 6, NK_TWO = 6, NK_ONE = 8, BLOCK = 128;
#else
constexpr int NQ = 2, NK = 4, NK_TWO = 4, NK_ONE = 8, BLOCK = 128;
#endif
constexpr int BQ = NQ * W;
// Below this many keys K is copied with zero rows behind it, so that a tile may run over the end.
constexpr int64_t SHORT_KEYS = 2 * NK_ONE;
// Tiles may write this many rows before the first and behind the last of a strip.
constexpr int SLACK = NK_ONE;

template <bool PAIRS>
struct Element {
  typedef float type;
};
template <>
struct Element<true> {
  typedef bf16 type;
};

// N numbers (or bf16 pairs) `stride` elements apart. Four share a pointer, as many as one pointer can
// address with the registers stride and 3 * stride.
template <bool PAIRS, int N>
struct Column {
  typedef typename Element<PAIRS>::type KV;
  const char* base[(N + 3) / 4];
  int64_t stride, triple;

  FASTTX_INLINE Column(const KV* p, int64_t elements) {
    stride = elements * (int64_t)sizeof(KV);
    triple = 3 * stride;
    for (int n = 0; n < N; n += 4) base[n / 4] = (const char*)p + n * stride;
  }
  FASTTX_INLINE const void* operator[](int n) const {
    const char* p = base[n / 4];
    return n % 4 == 3 ? p + triple : p + n % 4 * stride;
  }
  FASTTX_INLINE void advance(int64_t bytes) {
    FASTTX_UNROLL(4)
    for (int i = 0; i < (N + 3) / 4; i++) {
      base[i] += bytes;
      asm("" : "+r"(base[i]));  // or the compiler keeps N pointers instead, and spills them
    }
  }
};

// c[n] += a * b[n], a: NV vectors.
template <bool PAIRS, int NV, int N, class B>
FASTTX_INLINE void multiply(vf (&c)[N][NV], const vf* a, const B& b) {
  vf x[NV];
  FASTTX_UNROLL(4)
  for (int v = 0; v < NV; v++) x[v] = a[v];
  FASTTX_UNROLL(16)
  for (int n = 0; n < N; n++) {
    if constexpr (PAIRS) {
      const vi y = broadcast_pair(b[n]);
      FASTTX_UNROLL(4)
      for (int v = 0; v < NV; v++) c[n][v] = dpbf16(c[n][v], (vi)x[v], y);
    } else {
      const vf y = broadcast((const float*)b[n]);
      FASTTX_UNROLL(4)
      for (int v = 0; v < NV; v++) c[n][v] = fma(x[v], y, c[n][v]);
    }
  }
}

template <bool PAIRS, int NV, int N>
FASTTX_INLINE void qk_tile(const vf* q, const typename Element<PAIRS>::type* k, int64_t ldk,
                           int64_t steps, vf* s, vf* top) {
  vf c[N][NV];
  FASTTX_UNROLL(16)
  for (int n = 0; n < N; n++)
    FASTTX_UNROLL(4)
    for (int v = 0; v < NV; v++) c[n][v] = vf{};
  Column<PAIRS, N> rows(k, ldk);
  for (const vf* end = q + steps * NQ; q != end; q += NQ) {
    multiply<PAIRS, NV, N>(c, q, rows);
    rows.advance(4);
  }
  FASTTX_UNROLL(4)
  for (int v = 0; v < NV; v++) {
    vf m = top[v];
    FASTTX_UNROLL(16)
    for (int n = 0; n < N; n++) {
      m = max(m, c[n][v]);
      s[n * NQ + v] = c[n][v];
    }
    top[v] = m;
  }
}

// Scores of keys [from, to) of a strip whose first key is key j0 of k; top: their maximum.
template <bool PAIRS, int NV, int N>
FASTTX_NOINLINE void qk_strip(const vf* q, const typename Element<PAIRS>::type* k,
                                        int64_t ldk, int64_t steps, vf* s, int64_t j0, int from,
                                        int to, vf* top) {
  vf m[NV];
  for (int v = 0; v < NV; v++) m[v] = top[v];
  int n = from;
  for (; n + N <= to && to - n != 8; n += N)
    qk_tile<PAIRS, NV, N>(q, k + (j0 + n) * ldk, ldk, steps, s + n * NQ, m);
  for (; n + 4 <= to; n += 4)
    qk_tile<PAIRS, NV, 4>(q, k + (j0 + n) * ldk, ldk, steps, s + n * NQ, m);
  if (n < to) {
    vf ignored[NV] = {};
    const int last = j0 + to - 4 >= 0 ? to - 4 : n;
    qk_tile<PAIRS, NV, 4>(q, k + (j0 + last) * ldk, ldk, steps, s + last * NQ, ignored);
    for (; n < to; n++)
      for (int v = 0; v < NV; v++) m[v] = max(m[v], s[n * NQ + v]);
  }
  for (int v = 0; v < NV; v++) top[v] = m[v];
}

// The same for `vectors` <= NQ neighbouring vectors of queries, without the maximum.
template <bool PAIRS>
FASTTX_INLINE void qk_some(int vectors, const vf* q, const typename Element<PAIRS>::type* k,
                           int64_t ldk, int64_t steps, vf* s, int64_t j0, int from, int to) {
  vf ignored[NQ] = {};
  if (vectors == 1)
    qk_strip<PAIRS, 1, NK_ONE>(q, k, ldk, steps, s, j0, from, to, ignored);
  else if (vectors == 2)
    qk_strip<PAIRS, 2, NK_TWO>(q, k, ldk, steps, s, j0, from, to, ignored);
  else if constexpr (NQ == 4)
    vectors == 3 ? qk_strip<PAIRS, 3, NK_TWO>(q, k, ldk, steps, s, j0, from, to, ignored)
                 : qk_strip<PAIRS, 4, NK>(q, k, ldk, steps, s, j0, from, to, ignored);
}

// Columns of a row: next to each other.
struct Row {
  const char* base;
  FASTTX_INLINE const void* operator[](int n) const { return base + 4 * n; }
};

template <bool PAIRS, int NV, int N>
FASTTX_INLINE void pv_tile(const vf* p, const typename Element<PAIRS>::type* v, int64_t ldv,
                           int64_t steps, vf* o, const vf* alpha) {
  vf c[N][NV];
  FASTTX_UNROLL(16)
  for (int n = 0; n < N; n++)
    FASTTX_UNROLL(4)
    for (int i = 0; i < NV; i++) c[n][i] = vf{};
  Row row = {(const char*)v};
  for (const vf* end = p + steps * NQ; p != end; p += NQ) {
    multiply<PAIRS, NV, N>(c, p, row);
    row.base += ldv * 4;
  }
  // Sums of a block are added to the total once: shorter chains, smaller error.
  FASTTX_UNROLL(16)
  for (int n = 0; n < N; n++)
    FASTTX_UNROLL(4)
    for (int i = 0; i < NV; i++)
      o[n * NQ + i] = alpha ? fma(o[n * NQ + i], alpha[i], c[n][i]) : c[n][i];
}

// O = O * alpha + V^T P over `steps` keys (pairs of keys), O = V^T P if alpha is null.
template <bool PAIRS, int NV, int N>
FASTTX_NOINLINE void pv_strip(const vf* p, const typename Element<PAIRS>::type* v,
                                        int64_t ldv, int64_t steps, int64_t Dv, vf* o,
                                        const vf* alpha) {
  constexpr int G = PAIRS ? 2 : 1;
  int64_t d = 0;
  for (; d + N <= Dv && Dv - d != 8; d += N) pv_tile<PAIRS, NV, N>(p, v + d * G, ldv, steps, o + d * NQ, alpha);
  for (; d + 4 <= Dv; d += 4) pv_tile<PAIRS, NV, 4>(p, v + d * G, ldv, steps, o + d * NQ, alpha);
  for (; d < Dv; d++) pv_tile<PAIRS, NV, 1>(p, v + d * G, ldv, steps, o + d * NQ, alpha);
}

// Probabilities 2^(s * scale - top) of rows [from, to); returns their sum in total.
template <bool PAIRS, int NV>
FASTTX_INLINE void exp_rows(const vf* s, vf* p, int from, int to, vf scale, const vf* top, vf* total) {
  vf sum[NV];
  FASTTX_UNROLL(4)
  for (int v = 0; v < NV; v++) sum[v] = vf{};
  if constexpr (PAIRS) {
    const vi ones = set1i(0x3f803f80);
    for (int k = from; k < to; k += 2) {
      FASTTX_UNROLL(4)
      for (int v = 0; v < NV; v++) {
        const vi x = exp2_pair(fms(s[k * NQ + v], scale, top[v]),
                               fms(s[(k + 1) * NQ + v], scale, top[v]));
        sum[v] = dpbf16(sum[v], x, ones);
        p[k / 2 * NQ + v] = (vf)x;
      }
    }
  } else {
    for (int k = from; k < to; k++) {
      FASTTX_UNROLL(4)
      for (int v = 0; v < NV; v++) {
        const vf a = exp2<6>(fms(s[k * NQ + v], scale, top[v]));
        sum[v] += a;
        p[k * NQ + v] = a;
      }
    }
  }
  FASTTX_UNROLL(4)
  for (int v = 0; v < NV; v++) total[v] += sum[v];
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
