// The gradient of a mask with both axes: a block holds a tile of it and adds the pairs (batch,
// head) that share it, in order.
#include "cuda/sm80/attention_bwd.h"

namespace fasttx {
namespace {

template <int D_>
struct MaskShape {
  static constexpr int D = D_, THREADS = 128, ROWS = 64, KEYS = 32, N = KEYS / 8;
  static constexpr int Q = 0, DOUT = ROWS * D * 2, K = 2 * DOUT, V = K + KEYS * D * 2;
  static constexpr int BIAS = V + KEYS * D * 2;
  static constexpr int SHARED = BIAS + sizeof(BiasTile<ROWS, KEYS>);
};

struct MaskGradient {
  Attention p;
  int row_tiles, key_tiles;
};

template <class F>
__global__ void __launch_bounds__(F::THREADS)
    attention_bwd_mask(const __grid_constant__ MaskGradient f) {
  constexpr int D = F::D, N = F::N;
  FASTTX_SHARED(shared);
  const Attention& p = f.p;
  const fasttx_attention& a = p.a;
  const fasttx_tensor& to = a.dmask;
  const int thread = threadIdx.x, lane = thread % 32, own = thread / 32 * 16;
  const int row = own + lane / 4, column = lane % 4 * 2;
  const int tiles = f.row_tiles * f.key_tiles;
  const int tile = blockIdx.x % tiles, owner = blockIdx.x / tiles;
  const int i0 = tile / f.key_tiles * F::ROWS, j0 = tile % f.key_tiles * F::KEYS;
  const int heads = static_cast<int>(to.sizes[1]);
  const int batch = owner / heads, head = owner % heads;
  const int end_batch = to.sizes[0] == 1 ? p.B : batch + 1, end_head = heads == 1 ? p.H : head + 1;
  const uint32_t base = shared_address(shared);
  auto& bias_tile = *reinterpret_cast<BiasTile<F::ROWS, F::KEYS>*>(shared + F::BIAS);

  auto get = [&](auto rows, int offset, const fasttx_tensor& t, int b, int h, int first, int limit,
                 int width) {
    fetch<decltype(rows)::value, D, F::THREADS>(
        base + offset, static_cast<const uint16_t*>(t.data) + rows_of(t, b, h, 0), t.strides[2],
        first, limit, width, thread);
  };
  float sum[N][4] = {};
  for (int b = batch; b < end_batch; b++)
    for (int h = head; h < end_head; h++) {
      const Place at = place_of(p, b, h);
      const Range keys = visible_keys(at, i0, F::ROWS);
      if (keys.end <= j0 || keys.begin >= j0 + F::KEYS) continue;
      get(std::integral_constant<int, F::ROWS>(), F::Q, a.q, b, h, i0, at.S, p.D);
      get(std::integral_constant<int, F::ROWS>(), F::DOUT, a.dout, b, h, i0, at.S, p.Dv);
      get(std::integral_constant<int, F::KEYS>(), F::K, a.k, b, at.kv_head, j0, at.T, p.D);
      get(std::integral_constant<int, F::KEYS>(), F::V, a.v, b, at.kv_head, j0, at.T, p.Dv);
      cp_async_commit();
      const Bias bias = make_bias(p, at);
      stage_bias<F::THREADS>(bias_tile, bias, at, i0, j0, thread);
      cp_async_wait<0>();
      __syncthreads();
      float s[1][N][4] = {}, dp[1][N][4] = {};
      auto multiply = [&](auto type) {
        multiply_rows<decltype(type), D>(s, base + F::Q, own, base + F::K);
        multiply_rows<decltype(type), D>(dp, base + F::DOUT, own, base + F::V);
      };
      if (a.q.dtype == FASTTX_BF16)
        multiply(bf16());
      else
        multiply(f16());
      KeepRows<N> keep;
      if (p.dropout.threshold)
        keep.make(p.dropout, load_key(p.dropout), i0 + row, j0, at.head, at.sequence);
      const RowStatistics rows[2] = {row_statistics(p, at, i0 + row),
                                     row_statistics(p, at, i0 + row + 8)};
#pragma unroll
      for (int x = 0; x < N; x++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int r = row + 8 * (e / 2), c = column + 8 * x + e % 2;
          const float more = bias_at(bias_tile, bias, at, i0, j0, r, c);
          const bool hidden = !in_band(at, i0 + r, j0 + c);
          const bool kept = !p.dropout.threshold || keep.kept(x, e / 2, e % 2);
          sum[x][e] +=
              pair_gradient<true>(p, s[0][x][e], more, hidden, dp[0][x][e], rows[e / 2], kept).ds;
        }
      __syncthreads();
    }
#pragma unroll
  for (int x = 0; x < N; x++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int i = i0 + row + 8 * (e / 2), j = j0 + column + 8 * x + e % 2;
      if (i < p.S && j < p.T)
        store1(to.data, to.dtype,
               batch * to.strides[0] + head * to.strides[1] + i * to.strides[2] + j * to.strides[3],
               sum[x][e]);
    }
}

template <int D>
int launch_mask(const Attention& p, void* stream) {
  using F = MaskShape<D>;
  const MaskGradient f = {p, (p.S + F::ROWS - 1) / F::ROWS, (p.T + F::KEYS - 1) / F::KEYS};
  const int64_t blocks =
      int64_t{f.row_tiles} * f.key_tiles * p.a.dmask.sizes[0] * p.a.dmask.sizes[1];
  if (!blocks) return cudaSuccess;
  return launch(attention_bwd_mask<F>, dim3(static_cast<unsigned>(blocks)), F::THREADS, F::SHARED,
                stream, f);
}

}  // namespace

int attention_bwd_mask_sm80(const Attention& p, void* stream) {
  const int D = p.D > p.Dv ? p.D : p.Dv;
  if (D > 128) return launch_mask<256>(p, stream);
  return D > 64 ? launch_mask<128>(p, stream) : launch_mask<64>(p, stream);
}

}  // namespace fasttx
