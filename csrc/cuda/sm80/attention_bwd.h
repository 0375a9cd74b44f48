// The attention backward by mma.sync, without atomics. One kernel holds a tile of rows and walks
// over the keys they see (dq, the table's sums, row sums of ds); the same kernel, keys down, holds
// a tile of keys and walks over the rows of all its query heads (dk, dv, column sums of ds). Scores
// are computed once in each; probabilities stay in registers as the left operand of the next
// product.
//
//     p = exp(logits - lse)   dp = dropout(dout v^T)   ds = p (dp - delta)
//     dq = scale ds k         dk = scale ds^T q        dv = dropout(p)^T dout
#pragma once
#include "cuda/sm80/attention_tile.h"
#include "cuda/tile/careful_bwd.h"

namespace fasttx {

struct Backward {
  Attention p;
  int general;  // whatever makes a call not plain (is_plain), dropout, statistics of two numbers
  int only_dv;  // of the two passes by keys where heads are wide
  int row_tiles, key_tiles;  // of a head
  float* row_sums;           // [B, H, S] of ds; or null
  float* column_sums;        // [B, H, T]; or null
  float* table_sums;         // [B, H, row_tiles, table_width]; or null
  int table_width;
};

struct RowStatistics {
  float peak, log_total, delta;
};
FASTTX_DEVICE RowStatistics row_statistics(const Attention& p, const Place& at, int i) {
  if (i >= at.S) return {INFINITY, 0.0f, 0.0f};
  const int64_t row = statistics_of(p, at) + i;
  return {load(p.peak + row), p.two_numbers ? load(p.log_total + row) : 0.0f, load(p.delta + row)};
}

struct PairGradient {
  float weight;  // the probability, before dropout
  float ds;      // the logit's gradient
  float bend;    // and what makes it the score's
};
// Of one pair from its products q k^T and dout v^T; more: what is added to the score.
template <bool GENERAL>
FASTTX_DEVICE PairGradient pair_gradient(const Attention& p, float product, float more, bool hidden,
                                         float dp, const RowStatistics& row, bool kept) {
  float bend = 1.0f, x;
  if constexpr (GENERAL) {
    x = score_of(p, product, bend) + more - row.peak - row.log_total;
    hidden |= more == -INFINITY;
    dp = kept ? dp * p.dropout.scale : 0.0f;
  } else {
    x = fmaf(product, p.scale, -row.peak);
  }
  const float weight = hidden ? 0.0f : exp2_approx(x);
  return {weight, hidden ? 0.0f : weight * (dp - row.delta), bend};
}

template <int D_, bool BY_KEYS_>
struct BackwardShape {
  static constexpr int D = D_;
  static constexpr bool BY_KEYS = BY_KEYS_;
  static constexpr bool APART = BY_KEYS && D == 256;  // dk and dv, each in a pass of its own
  static constexpr int WARPS = 4, THREADS = 32 * WARPS;
  static constexpr int M = D == 64 && !BY_KEYS ? 2 : 1;  // 16 rows (or keys) each, a warp
  static constexpr int OWN = 16 * M * WARPS, OTHER = 32, N = OTHER / 8;
  static constexpr int STAGES = D == 256 ? 1 : 2;
  using BiasOf = std::conditional_t<BY_KEYS, BiasTile<OTHER, OWN>, BiasTile<OWN, OTHER>>;

  static constexpr int OWN_TILE = OWN * D * 2, OTHER_TILE = OTHER * D * 2;
  static constexpr int STAGE = 2 * OWN_TILE, ROWS = STAGE + STAGES * 2 * OTHER_TILE;
  static constexpr int BIAS = ROWS + (BY_KEYS ? STAGES * 3 * OTHER * 4 : 0);
  // Without a bias shared memory ends where its tiles would begin.
  static constexpr int DS = BIAS + STAGES * static_cast<int>(sizeof(BiasOf));
  static constexpr int DS_PITCH = OTHER + 1;
  // ds by distance: with a table's gradient alone; where heads are wide in v's place.
  static constexpr int MORE = D == 256 || BY_KEYS ? 0 : OWN * DS_PITCH * 4;
};
// Distances of a tile of rows, and of its share of table_sums: those within reach, and on both
// sides as many as a tile has, so that no two threads add to one.
template <class F>
constexpr int TILE_DISTANCES = F::OWN + F::OTHER;
inline int table_width(const Attention& p, int distances) {
  return 2 * (static_cast<int>(p.a.lut.sizes[0] / 2) + distances) + 1;
}

template <class F>
FASTTX_DEVICE bool place_backward(const Backward& f, Place& at) {
  const int tiles = F::BY_KEYS ? f.key_tiles : f.row_tiles;
  const int heads = F::BY_KEYS ? f.p.G : f.p.H;
  const int block = opaque(static_cast<int>(blockIdx.x)), pair = block / tiles;
  int tile = block % tiles;
  if (!F::BY_KEYS && f.p.right != UNBOUNDED && !f.p.sequences) tile = tiles - 1 - tile;
  return make_place<F::BY_KEYS>(f.p, tile, pair % heads, pair / heads, F::OWN, at);
}

// Adds ds [OWN][DS_PITCH] of a tile by distance; distances begin at `least`.
template <class F>
FASTTX_DEVICE void add_distances(float* sums, const float* ds, int least, int origin, int reach,
                                 int thread) {
  constexpr int COUNT = TILE_DISTANCES<F>;
  const int first = least - origin;
  for (int x = thread; x < COUNT - 1; x += F::THREADS) {
    // Row r and key c with c - r = x - (OWN - 1).
    float sum = 0.0f;
    for (int c = max(0, x - (F::OWN - 1)); c < min(F::OTHER, x + 1); c++)
      sum += ds[(c - x + F::OWN - 1) * F::DS_PITCH + c];
    int place = first + x + reach + COUNT;
    if (first + COUNT - 2 <= -reach) place = x;            // all share the first bucket ..
    if (first >= reach) place = 2 * reach + 1 + COUNT + x;  // .. or the last
    sums[place] += sum;
  }
}

FASTTX_RARE inline void careful_row_gradient(const Attention& p, int sequence, int head, int i) {
  careful_dq(p, sequence, head, i);
}
FASTTX_RARE inline void careful_key_gradients(const Attention& p, int sequence, int kv_head,
                                              int j) {
  careful_key(p, sequence, kv_head, j);
}

template <class T, class F>
__global__ void __launch_bounds__(F::THREADS) attention_bwd(const __grid_constant__ Backward f) {
  constexpr int D = F::D, M = F::M, N = F::N, OWN = F::OWN, OTHER = F::OTHER;
  constexpr bool BY_KEYS = F::BY_KEYS;
  FASTTX_SHARED(shared);
  const Attention& p = f.p;
  const fasttx_attention& a = p.a;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4;
  const int own = thread / 32 * 16 * M;  // the warp's rows (keys) within the tile
  const bool general = D == 256 || f.general, only_dv = F::APART && f.only_dv;
  float* sums = nullptr;
  if constexpr (!BY_KEYS) {
    if (f.table_sums) {
      sums = f.table_sums + static_cast<int64_t>(blockIdx.x) * f.table_width;
      for (int x = thread; x < f.table_width; x += F::THREADS) sums[x] = 0.0f;
    }
  }
  Place at;
  if (!place_backward<F>(f, at)) return;

  const uint32_t base = shared_address(shared);
  const fasttx_tensor &own0 = BY_KEYS ? a.k : a.q, &own1 = BY_KEYS ? a.v : a.dout;
  const fasttx_tensor &other0 = BY_KEYS ? a.q : a.k, &other1 = BY_KEYS ? a.dout : a.v;
  const int limit = BY_KEYS ? at.T : at.S, other_limit = BY_KEYS ? at.S : at.T;
  const int other_origin = BY_KEYS ? at.row0 : at.key0;
  {
    const int head = BY_KEYS ? at.kv_head : at.head, origin = BY_KEYS ? at.key0 : at.row0;
    fetch<OWN, D, F::THREADS>(
        base, static_cast<const T*>(own0.data) + rows_of(own0, at.batch, head, origin),
        own0.strides[2], at.first, limit, p.D, thread);
    fetch<OWN, D, F::THREADS>(
        base + F::OWN_TILE,
        static_cast<const T*>(own1.data) + rows_of(own1, at.batch, head, origin),
        own1.strides[2], at.first, limit, p.Dv, thread);
  }

  Range range = BY_KEYS ? visible_queries(at, at.first, OWN) : visible_keys(at, at.first, OWN);
  if (general) {
    const Bias bias = make_bias(p, at);
    if constexpr (!BY_KEYS) {
      range = shown_keys(bias, at, range);
    } else if (p.group == 1 || a.mask.strides[1] == 0) {
      const Range shown = shown_keys(bias, at, {at.first, min(at.T, at.first + OWN)});
      if (shown.begin >= shown.end) range.end = range.begin;
    }
  }
  const int begin = range.begin / OTHER * OTHER;
  const int tiles = range.begin < range.end ? (range.end - begin + OTHER - 1) / OTHER : 0;
  const int steps = BY_KEYS ? tiles * p.group : tiles;  // all rows of a head, then the next head

  // The n-th tile of the other side, with what depends on it alone.
  auto fetch_other = [&](int n) {
    const int now = opaque(thread), x0 = begin + (BY_KEYS ? n % tiles : n) * OTHER;
    const int stage = n % F::STAGES;
    Place here = at;
    here.head = opaque(at.head) + (BY_KEYS ? n / tiles : 0);
    here.batch = opaque(at.batch);
    const int head = BY_KEYS ? here.head : at.kv_head;
    const uint32_t to = base + F::STAGE + stage * 2 * F::OTHER_TILE;
    fetch<OTHER, D, F::THREADS>(
        to, static_cast<const T*>(other0.data) + rows_of(other0, here.batch, head, other_origin),
        other0.strides[2], x0, other_limit, p.D, now);
    fetch<OTHER, D, F::THREADS>(
        to + F::OTHER_TILE,
        static_cast<const T*>(other1.data) + rows_of(other1, here.batch, head, other_origin),
        other1.strides[2], x0, other_limit, p.Dv, now);
    cp_async_commit();
    if constexpr (BY_KEYS) {
      if (now < OTHER) {
        float* rows = reinterpret_cast<float*>(shared + F::ROWS) + stage * 3 * OTHER + now;
        const RowStatistics row = row_statistics(p, here, x0 + now);
        rows[0] = row.peak;
        rows[OTHER] = row.log_total;
        rows[2 * OTHER] = row.delta;
      }
    }
    if (general)
      stage_bias<F::THREADS>(reinterpret_cast<typename F::BiasOf*>(shared + F::BIAS)[stage],
                             make_bias(p, here), here, BY_KEYS ? x0 : at.first,
                             BY_KEYS ? at.first : x0, now);
  };

  float first[M][D / 8][4] = {};  // dq, or dk; dv where it is apart
  constexpr bool TWO = BY_KEYS && !F::APART;
  float second[TWO ? M : 1][TWO ? D / 8 : 1][4] = {};  // dv
  float side_sum[M][2] = {};
  RowStatistics own_rows[BY_KEYS ? 1 : M][2];
  if constexpr (!BY_KEYS) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        own_rows[m][h] = row_statistics(p, at, at.first + own + 16 * m + g + 8 * h);
  }

  if (steps)
    fetch_other(0);
  else
    cp_async_commit();
  for (int n = 0; n < steps; n++) {
    cp_async_wait<0>();
    __syncthreads();  // tile n is there, and with two stages tile n - 1 no longer read
    if (F::STAGES == 2 && n + 1 < steps) fetch_other(n + 1);
    const int stage = n % F::STAGES, x0 = begin + (BY_KEYS ? n % tiles : n) * OTHER;
    const uint32_t other = base + F::STAGE + stage * 2 * F::OTHER_TILE;

    float s[M][N][4] = {}, dp[M][N][4] = {};
    multiply_rows<T, D>(s, base, opaque(own), other);
    if (!only_dv) multiply_rows<T, D>(dp, base + F::OWN_TILE, opaque(own), other + F::OTHER_TILE);

    const int now = opaque(thread), row = now / 32 * 16 * M + now % 32 / 4, column = now % 4 * 2;
    Place here = at;
    here.head = opaque(at.head) + (BY_KEYS ? n / tiles : 0);
    here.batch = opaque(at.batch);
    const int i0 = BY_KEYS ? x0 : at.first, j0 = BY_KEYS ? at.first : x0;
    bool edge;
    if constexpr (BY_KEYS)
      edge = j0 < i0 + OTHER - 1 + at.low || j0 + OWN - 1 > i0 + at.high ||
             i0 + OTHER > at.S;
    else
      edge = j0 < i0 + OWN - 1 + at.low || j0 + OTHER > min(at.T, i0 + at.high + 1) ||
             i0 + OWN > at.S;
    const float* rows = reinterpret_cast<float*>(shared + F::ROWS) + stage * 3 * OTHER;
    const auto& bias_tile = reinterpret_cast<typename F::BiasOf*>(shared + F::BIAS)[stage];
    const Bias bias = {&p, 0.0f};
    float* ds_tile = reinterpret_cast<float*>(
        shared + (D == 256 ? F::STAGE + stage * 2 * F::OTHER_TILE + F::OTHER_TILE : F::DS));
    if (D == 256 && sums) __syncthreads();  // v is no longer read

    // s becomes the weights, dp the gradients of the scores.
    auto pairs = [&](auto is_general) {
      constexpr bool GENERAL = decltype(is_general)::value;
      constexpr int KN = BY_KEYS ? N : 4;
      KeepRows<BY_KEYS ? 4 : N> keep_rows;
      KeepColumns<KN> keep_columns;
#pragma unroll
      for (int m = 0; m < M; m++) {
        if (GENERAL && p.dropout.threshold) {
          const Key key = load_key(p.dropout);
          if constexpr (BY_KEYS)
            keep_columns.make(p.dropout, key, i0, j0 + now / 32 * 16 * M + 16 * m, here.head,
                              at.sequence);
          else
            keep_rows.make(p.dropout, key, i0 + row + 16 * m, j0, here.head, at.sequence);
        }
#pragma unroll
        for (int x = 0; x < N; x++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int r = row + 16 * m + 8 * (e / 2), c = column + 8 * x + e % 2;
            const int i = BY_KEYS ? c : r, j = BY_KEYS ? r : c;  // within the tile
            const float more = GENERAL ? bias_at(bias_tile, bias, here, i0, j0, i, j) : 0.0f;
            const bool hidden = edge && (i0 + i >= at.S || !in_band(at, i0 + i, j0 + j));
            bool kept = true;
            if (GENERAL && p.dropout.threshold) {
              if constexpr (BY_KEYS)
                kept = keep_columns.kept(x, e / 2, e % 2);
              else
                kept = keep_rows.kept(x, e / 2, e % 2);
            }
            const RowStatistics own_row = own_rows[BY_KEYS ? 0 : m][e / 2];
            const RowStatistics statistics =
                BY_KEYS ? RowStatistics{rows[c], rows[OTHER + c], rows[2 * OTHER + c]} : own_row;
            const PairGradient pair =
                pair_gradient<GENERAL>(p, s[m][x][e], more, hidden, dp[m][x][e], statistics, kept);
            if constexpr (GENERAL) {
              side_sum[m][e / 2] += pair.ds;
              if (!BY_KEYS && sums) ds_tile[r * F::DS_PITCH + c] = pair.ds;
            }
            s[m][x][e] = kept ? pair.weight : 0.0f;
            dp[m][x][e] = only_dv ? s[m][x][e] : pair.ds * pair.bend;
          }
      }
    };
    if (D == 256 || general)
      pairs(std::true_type());
    else
      pairs(std::false_type());
    multiply_weights<T, D>(first, dp, other + (only_dv ? F::OTHER_TILE : 0));
    if constexpr (TWO) multiply_weights<T, D>(second, s, other + F::OTHER_TILE);

    if constexpr (!BY_KEYS) {
      if (sums) {
        __syncthreads();
        add_distances<F>(sums, ds_tile, j0 - i0 - (OWN - 1),
                         at.T - at.S + static_cast<int>(a.bias_shift),
                         static_cast<int>(a.lut.sizes[0] / 2), now);
        __syncthreads();
      }
    }
    if constexpr (BY_KEYS) {
      // The last rows of a head: its column sums.
      if (f.column_sums && !only_dv && n % tiles == tiles - 1) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float sum = row_sum(side_sum[m][h]);
            const int j = j0 + row + 16 * m + 8 * h;
            if (column == 0 && j < at.T)
              store(f.column_sums +
                        (static_cast<int64_t>(here.batch) * p.H + here.head) * p.T + j,
                    sum);
            side_sum[m][h] = 0.0f;
          }
      }
    }
    if (F::STAGES == 1) {
      __syncthreads();
      if (n + 1 < steps) fetch_other(n + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  place_backward<F>(f, at);
  if constexpr (!BY_KEYS) {
    if (f.row_sums) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float sum = row_sum(side_sum[m][h]);
          const int i = at.first + own + 16 * m + g + 8 * h;
          if (lane % 4 == 0 && i < at.S) store(f.row_sums + statistics_of(p, at) + i, sum);
        }
    }
  }
  if constexpr (BY_KEYS) {
    if (f.column_sums && !only_dv && !steps) {
      for (int x = thread; x < OWN * p.group; x += F::THREADS) {
        const int j = at.first + x % OWN;
        if (j < at.T)
          store(f.column_sums +
                    (static_cast<int64_t>(at.batch) * p.H + at.head + x / OWN) * p.T + j,
                0.0f);
      }
    }
  }
  bool finite = true;
  auto write = [&](const auto& sum, const fasttx_tensor& to, float scale) {
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = scale;
    finite = all_finite(sum) && finite;
    write_rows<T, D>(
        shared, own, sum, factor,
        static_cast<T*>(to.data) +
            rows_of(to, at.batch, BY_KEYS ? at.kv_head : at.head, BY_KEYS ? at.key0 : at.row0),
        to.strides[2], to.strides[3], at.first + own, BY_KEYS ? at.T : at.S,
        static_cast<int>(to.sizes[3]));
  };
  if (only_dv)
    write(first, a.dv, p.dropout.scale);
  else if (a.need & (BY_KEYS ? 2 : 1))
    write(first, BY_KEYS ? a.dk : a.dq, p.grad_scale);
  if constexpr (TWO)
    if (a.need & 4) write(second, a.dv, p.dropout.scale);
  if (__all_sync(~0u, finite)) return;
  for (int r = 0; r < 16 * M; r++) {
    const int x = at.first + own + r;
    if (x >= (BY_KEYS ? at.T : at.S)) return;
    if constexpr (BY_KEYS)
      careful_key_gradients(p, at.sequence, at.kv_head, x);
    else
      careful_row_gradient(p, at.sequence, at.head, x);
  }
}

template <class T, class F>
int launch_backward(const Backward& f, void* stream) {
  const int64_t blocks = F::BY_KEYS ? int64_t{f.key_tiles} * f.p.B * f.p.G
                                    : int64_t{f.row_tiles} * f.p.B * f.p.H;
  if (!blocks) return cudaSuccess;
  const int bytes = !f.general && F::D < 256 ? F::BIAS : F::DS + (f.table_sums ? F::MORE : 0);
  return launch(attention_bwd<T, F>, dim3(static_cast<unsigned>(blocks)), F::THREADS, bytes, stream,
                f);
}

// dq (and row sums, the table's sums) or, by keys, dk and dv (and column sums).
template <class T, bool BY_KEYS>
int launch_backward_side(const Backward& f, void* stream) {
  const int D = f.p.D > f.p.Dv ? f.p.D : f.p.Dv;
  if (D <= 64) return launch_backward<T, BackwardShape<64, BY_KEYS>>(f, stream);
  if (D <= 128) return launch_backward<T, BackwardShape<128, BY_KEYS>>(f, stream);
  Backward part = f;
  int status = cudaSuccess;
  if (!BY_KEYS || f.p.a.need & 2 || f.column_sums)
    status = launch_backward<T, BackwardShape<256, BY_KEYS>>(part, stream);
  part.only_dv = 1;
  if (BY_KEYS && status == cudaSuccess && f.p.a.need & 4)
    status = launch_backward<T, BackwardShape<256, BY_KEYS>>(part, stream);
  return status;
}

}  // namespace fasttx
