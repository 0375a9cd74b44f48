// The attention forward by mma.sync, after FlashAttention-2 (Dao, arXiv 2307.08691): a block holds
// BM queries and walks over the keys they see by BN; K of the next tile is under way during the
// softmax, V during the first product.
#pragma once
#include "cuda/sm80/attention_tile.h"

namespace fasttx {

// BIASED: whatever makes a call not plain (is_plain); DROPOUT: also dropout, where there is one.
template <int D_, bool BIASED_, bool DROPOUT_>
struct ForwardShape {
  static constexpr int D = D_;
  static constexpr bool BIASED = BIASED_, DROPOUT = DROPOUT_;
  static constexpr int WARPS = 4, THREADS = 32 * WARPS;
  static constexpr int M = D == 256 ? 1 : 2;  // 16 rows each, a warp
  static constexpr int BM = 16 * M * WARPS;
  // The widest that spill no registers.
  static constexpr int BN = D == 64 && !DROPOUT ? 64 : D == 128 && !BIASED ? 48 : 32;
  static constexpr int Q = 0, K = Q + BM * D * 2, V = K + BN * D * 2, BIAS = V + BN * D * 2;
  static constexpr int SHARED = BIAS + (BIASED ? sizeof(BiasTile<BM, BN>) : 0);
};

struct Forward {
  Attention p;
  int tiles;
};

// Once more at the end: what only the end needs does not stay in registers through the loop.
template <int BM>
FASTTX_DEVICE bool place_forward(const Forward& f, Place& at) {
  const int block = opaque(static_cast<int>(blockIdx.x)), pair = block / f.tiles;
  int tile = block % f.tiles;
  if (f.p.right != UNBOUNDED && !f.p.sequences) tile = f.tiles - 1 - tile;  // the longest first
  return make_place<false>(f.p, tile, pair % f.p.H, pair / f.p.H, BM, at);
}

template <class T, class F>
__global__ void __launch_bounds__(F::THREADS, 2) attention_fwd(const __grid_constant__ Forward f) {
  constexpr int D = F::D, M = F::M, BM = F::BM, BN = F::BN, N = BN / 8;
  FASTTX_SHARED(shared);
  const Attention& p = f.p;
  const fasttx_attention& a = p.a;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  Place at;
  if (!place_forward<BM>(f, at)) return;
  const int i0 = at.first, own = thread / 32 * 16 * M;  // the warp's rows within the tile

  const uint32_t base = shared_address(shared);
  const T* k = static_cast<const T*>(a.k.data) + rows_of(a.k, at.batch, at.kv_head, at.key0);
  const T* v = static_cast<const T*>(a.v.data) + rows_of(a.v, at.batch, at.kv_head, at.key0);
  auto fetch_k = [&](int j0) {
    fetch<BN, D, F::THREADS>(base + F::K, k, a.k.strides[2], j0, at.T, p.D, opaque(thread));
    cp_async_commit();
  };
  Bias bias;
  auto& bias_tile = *reinterpret_cast<BiasTile<BM, BN>*>(shared + F::BIAS);
  Range keys = visible_keys(at, i0, BM);
  if constexpr (F::BIASED) {
    bias = make_bias(p, at);
    keys = shown_keys(bias, at, keys);
  }
  const int begin = keys.begin / BN * BN;

  fetch<BM, D, F::THREADS>(base + F::Q,
                           static_cast<const T*>(a.q.data) +
                               rows_of(a.q, at.batch, at.head, at.row0),
                           a.q.strides[2], i0, at.S, p.D, thread);
  if (begin < keys.end)
    fetch_k(begin);
  else
    cp_async_commit();

  float o[M][D / 8][4] = {}, peak[M][2], total[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; m++) peak[m][0] = peak[m][1] = -INFINITY;

  for (int j0 = begin; j0 < keys.end; j0 += BN) {
    cp_async_wait<0>();
    __syncthreads();  // K is there; V and the bias of the last tile are no longer read
    fetch<BN, D, F::THREADS>(base + F::V, v, a.v.strides[2], j0, at.T, p.Dv, opaque(thread));
    cp_async_commit();
    const int now = opaque(thread), row = now / 32 * 16 * M + now % 32 / 4, column = now % 4 * 2;
    Place here = at;
    if constexpr (F::BIASED) {
      here.head = opaque(at.head);
      here.batch = opaque(at.batch);
      stage_bias<F::THREADS>(bias_tile, bias, here, i0, j0, opaque(thread));
    }

    float s[M][N][4] = {};
    multiply_rows<T, D>(s, base + F::Q, opaque(thread) / 32 * 16 * M, base + F::K);
    cp_async_wait<0>();
    __syncthreads();  // V and the bias are there, K is no longer read
    if (j0 + BN < keys.end) fetch_k(j0 + BN);

    if constexpr (F::BIASED) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) s[m][n][e] = score_of(p, s[m][n][e]);
      add_bias(s, bias_tile, bias, here, i0, j0, row, column);
    }
    if (j0 < i0 + BM - 1 + at.low || j0 + BN > min(at.T, i0 + at.high + 1)) {  // crosses an edge
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int i = i0 + row + 16 * m + 8 * h, c = j0 + column;
          const int low = i + at.low - c, high = min(i + at.high, at.T - 1) - c;
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (8 * n + e < low || 8 * n + e > high) s[m][n][2 * h + e] = -INFINITY;
        }
    }

    // Without a bias the scale is applied with the maximum.
    const float scale = F::BIASED ? 1.0f : p.scale;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = peak[m][h];
#pragma unroll
        for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        top = row_max(top);
        const float shift = top == -INFINITY ? 0.0f : top * scale;
        const float decay = exp2_approx(peak[m][h] * scale - shift);
        peak[m][h] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; e++) {
            s[m][n][e] =
                exp2_approx(F::BIASED ? s[m][n][e] - shift : fmaf(s[m][n][e], scale, -shift));
            sum += s[m][n][e];
          }
        total[m][h] = total[m][h] * decay + sum;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; e++) o[m][n][e] *= decay;
      }
    if constexpr (F::DROPOUT) {
      if (D == 64 || p.dropout.threshold) {
        const Key key = load_key(p.dropout);
#pragma unroll
        for (int m = 0; m < M; m++) {
          KeepRows<N> keep;
          keep.make(p.dropout, key, i0 + row + 16 * m, j0, at.head, at.sequence);
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              if (!keep.kept(n, e / 2, e % 2)) s[m][n][e] = 0.0f;
        }
      }
    }
    multiply_weights<T, D>(o, s, base + F::V);
  }
  cp_async_wait<0>();

  place_forward<BM>(f, at);
  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      total[m][h] = row_sum(total[m][h]);
      peak[m][h] *= F::BIASED ? 1.0f : p.scale;
      const bool empty = total[m][h] == 0.0f;
      factor[m][h] = empty ? 0.0f : (F::DROPOUT ? p.dropout.scale : 1.0f) / total[m][h];
      const int i = at.first + own + 16 * m + g + 8 * h;
      if (t == 0 && i < at.S) {
        float lse = fmaf(log2f(total[m][h]), LN2, peak[m][h] * LN2);
        if (peak[m][h] == LOWEST) lse = LOWEST;
        if (empty) lse = -INFINITY;
        store(static_cast<float*>(a.lse.data) + at.batch * a.lse.strides[0] +
                  at.head * a.lse.strides[1] + (at.row0 + i) * a.lse.strides[2],
              lse);
      }
    }
  __syncthreads();  // Q is there, even without a key, before its memory is used
  T* out = static_cast<T*>(a.out.data) + rows_of(a.out, at.batch, at.head, at.row0);
  const bool finite = all_finite(o);
  write_rows<T, D>(shared + F::Q, own, o, factor, out, a.out.strides[2], a.out.strides[3],
                   at.first + own, at.S, p.Dv);
  if (__all_sync(~0u, finite)) return;
#pragma unroll
  for (int m = 0; m < M; m++)
    for (int r = 0; r < 16; r++) {
      const int i = at.first + own + 16 * m + r, from = r % 8 * 4;
      const float top = __shfl_sync(~0u, r < 8 ? peak[m][0] : peak[m][1], from);
      const float sum = __shfl_sync(~0u, r < 8 ? total[m][0] : total[m][1], from);
      if (i < at.S) careful_out(p, at.sequence, at.head, i, top, log2f(sum));
    }
}

template <class T, class F>
int launch_forward(const Attention& p, void* stream) {
  const int64_t tiles = tile_count(p.S, p.sequences, F::BM);
  const Forward f = {p, static_cast<int>(tiles)};
  return launch(attention_fwd<T, F>, dim3(static_cast<unsigned>(tiles * p.B * p.H)), F::THREADS,
                F::SHARED, stream, f);
}

// All kernels of a dtype.
template <class T>
int launch_forward(const Attention& p, void* stream) {
  const bool drops = p.dropout.threshold != 0, plain = is_plain(p);
  const int D = p.D > p.Dv ? p.D : p.Dv;
  if (D > 128) return launch_forward<T, ForwardShape<256, true, true>>(p, stream);
  if (D > 64)
    return plain && !drops ? launch_forward<T, ForwardShape<128, false, false>>(p, stream)
                           : launch_forward<T, ForwardShape<128, true, true>>(p, stream);
  if (drops) return launch_forward<T, ForwardShape<64, true, true>>(p, stream);
  if (!plain) return launch_forward<T, ForwardShape<64, true, false>>(p, stream);
  return launch_forward<T, ForwardShape<64, false, false>>(p, stream);
}

}  // namespace fasttx
