// Probabilities exp(logits - lse) of chosen heads and query rows, or their averages over the cells of a
// grid: the attention forward's products and logits, one strip of BLOCK keys x BQ queries at a time.
#include "cpu/attention_map.h"

#include <string.h>

#include "cpu/attention_fwd_product.h"

namespace fasttx::FASTTX_ISA {

int attention_map_fwd(const fasttx_attention_map& args);

namespace {

constexpr float NOT_A_NUMBER = __builtin_nanf("");
constexpr float LOG2E_LOW = 1.92596299e-8f;  // log2(e) - LOG2E

template <class E>
constexpr bool PAIRED = false;
template <>
constexpr bool PAIRED<bf16> = has_dpbf16;

// Working memory of a thread.
struct Tile {
  vf* q;        // [D or D / 2][NQ]
  vf* s;        // [BLOCK][NQ] logits, then probabilities, SLACK rows around
  void* k;      // keys of a strip, where they cannot be read in place
  float* sums;  // [T] sums over the rows of a cell
  float* bias;              // memory of `built`,
  int64_t sequence, head;   // which is the bias of these
  Bias built;
};

struct Map {
  Problem p;
  const fasttx_attention_map* a;
  int64_t heads, rows;

  static int64_t chosen(const fasttx_tensor& list, int64_t i) {
    return list.data ? ((const int64_t*)list.data)[i * list.strides[0]] : i;
  }
  // The i-th query row, -1 for one that does not exist.
  int64_t row(int64_t i) const {
    const int64_t r = chosen(a->rows, i);
    return r >= 0 && r < p.S ? r : -1;
  }
  // Rows from the i-th one that lie one after the other, at most BQ of them before `end`.
  int64_t run(int64_t i, int64_t end) const {
    const int64_t first = row(i);
    int64_t n = 1;
    while (n < BQ && i + n < end && first >= 0 && row(i + n) == first + n) n++;
    return n;
  }
  float* out(int64_t b, int64_t h, int64_t i) const { return at<float>(a->out, b, h, i); }
};

template <class E>
struct Strips {
  static constexpr bool PAIRS = PAIRED<E>;
  static constexpr int G = PAIRS ? 2 : 1;
  typedef typename Element<PAIRS>::type KV;

  static bool packs(const Problem& p) {
    return sizeof(E) != sizeof(KV) || stride_of(p.a->k, 3) != 1 || p.D % G || p.T < 4;
  }

  // f(j0, nk) for every strip of keys, t.s holding the probabilities of rows [i, i + n).
  template <class F>
  static void each(const Map& m, const Head& h, const Bias& b, int64_t i, int64_t n, const Tile& t,
                   const F& f) {
    const Problem& p = m.p;
    const fasttx_attention& a = *p.a;
    const E* q = at<E>(a.q, h.batch, h.head, i);
    if constexpr (PAIRS) pack_lanes_pairs<NQ>(q, a.q.strides[2], a.q.strides[3], n, p.D, (vi*)t.q);
    else pack_lanes<NQ>(q, a.q.strides[2], a.q.strides[3], n, p.D, t.q);
    const int vectors = (int)((n + W - 1) / W);
    const int64_t steps = (p.D + G - 1) / G, width = round_up(p.D, G);
    const int64_t lse_stride = stride_of(a.lse, 2);
    vf lse[NQ], low[NQ];  // times log2(e), in two numbers
    for (int v = 0; v < vectors; v++) {
      const float* from = at<float>(a.lse, h.batch, h.head, 0) + (i + v * W) * lse_stride;
      const vf x = load_strided(from, lse_stride, (int)min64(W, n - v * W)), y = to_log2(x);
      lse[v] = select(equal(y, set1(-INF)), set1(INF), y);
      low[v] = select(less(abs(x), set1(1e6f)), fma(x, set1(LOG2E_LOW), fms(x, set1(LOG2E), y)), vf{});
    }
    Range seen = visible_keys(h, i, i + n);
    seen = {max64(seen.begin, b.keys.begin), min64(seen.end, b.keys.end)};
    for (int64_t j0 = 0; j0 < h.T; j0 += BLOCK) {
      const int nk = (int)min64(BLOCK, h.T - j0);
      if (j0 >= seen.end || j0 + nk <= seen.begin) {
        for (int k = 0; k < nk * NQ; k++) t.s[k] = vf{};
        f(j0, nk);
        continue;
      }
      const E* k = at<E>(a.k, h.batch, h.kv_head, j0);
      if (packs(p)) {
        KV* packed = (KV*)t.k;
        if constexpr (PAIRS) copy_rows(k, a.k.strides[2], a.k.strides[3], nk, p.D, width, packed);
        else pack_rows(k, a.k.strides[2], a.k.strides[3], nk, p.D, width, packed);
        memset((void*)(packed + nk * width), 0, 4 * width * sizeof(KV));
        qk_some<PAIRS>(vectors, t.q, packed, width, steps, t.s, 0, 0, nk);
      } else {
        qk_some<PAIRS>(vectors, t.q, (const KV*)k - j0 * a.k.strides[2], a.k.strides[2], steps, t.s,
                       j0, 0, nk);
      }
      apply_logits<NQ>(p, h, b, t.s, i, j0, nk);
      for (int x = 0; x < nk; x++) {
        const bool shown = j0 + x >= b.keys.begin && j0 + x < b.keys.end;
        for (int v = 0; v < vectors; v++) {
          vf& s = t.s[x * NQ + v];
          const vmask hidden = equal(s, set1(-INF));
          s = shown ? select(hidden, vf{}, exp2<6>((s - lse[v]) - low[v])) : vf{};
        }
      }
      f(j0, nk);
    }
  }

  // Probabilities of n rows, the first one `to`.
  static void write(const Map& m, const Head& h, const Bias& b, int64_t i, int64_t n, float* to,
                    const Tile& t) {
    const int64_t stride = m.a->out.strides[2];
    each(m, h, b, i, n, t, [&](int64_t j0, int nk) {
      for (int v = 0; v * W < n; v++)
        for (int k = 0; k < nk; k += W) {
          vf x[W];
          FASTTX_UNROLL(16)
          for (int r = 0; r < W; r++) x[r] = t.s[(k + r) * NQ + v];
          transpose(x);
          for (int r = 0; r < W && v * W + r < n; r++)
            store_strided(to + (v * W + r) * stride + j0 + k, 1, x[r], nk - k);
        }
    });
  }

  // Adds the probabilities of n rows to t.sums.
  static void add(const Map& m, const Head& h, const Bias& b, int64_t i, int64_t n, const Tile& t) {
    each(m, h, b, i, n, t, [&](int64_t j0, int nk) {
      for (int k = 0; k < nk; k++) {
        vf sum = {};
        for (int v = 0; v * W < n; v++) {
          const vmask inside = less(lane_index(), set1i((int)(n - v * W)));
          sum += zero_unless(inside, t.s[k * NQ + v]);
        }
        t.sums[j0 + k] += hsum(sum);
      }
    });
  }

  static bool make_tile(const Map& m, Tile* t) {
    if (t->q) return true;
    const Problem& p = m.p;
    const int64_t q = round_up(p.D, 2 * W) * NQ, s = (BLOCK + 2 * SLACK) * NQ;
    const size_t k = packs(p) ? round_up((BLOCK + 4) * round_up(p.D, G) * sizeof(KV), 64) : 0;
    const size_t sums = m.a->pool ? round_up(p.T * sizeof(float), 64) : 0;
    const size_t bytes = (q + s) * sizeof(vf) + k + sums + bias_floats(p) * sizeof(float);
    char* memory = (char*)scratch(SCRATCH_TILE, bytes);
    if (!memory) return false;
    memset(memory, 0, (q + s) * sizeof(vf));
    t->q = (vf*)memory;
    t->s = t->q + q + SLACK * NQ;
    t->k = memory + (q + s) * sizeof(vf);
    t->sums = (float*)((char*)t->k + k);
    t->bias = (float*)((char*)t->sums + sums);
    t->sequence = t->head = -1;
    return true;
  }

  // Row x of a grid of averages.
  static void pool_row(const Map& m, const Head& h, const Bias& b, int64_t x, float* to,
                       const Tile& t) {
    const int64_t P = m.a->pool, T = m.p.T, begin = x * m.rows / P;
    const int64_t end = ((x + 1) * m.rows + P - 1) / P;
    memset(t.sums, 0, T * sizeof(float));
    for (int64_t i = begin, n; i < end; i += n) {
      n = m.run(i, end);
      if (m.row(i) >= 0) add(m, h, b, m.row(i), n, t);
      else
        for (int64_t j = 0; j < T; j++) t.sums[j] = NOT_A_NUMBER;
    }
    for (int64_t y = 0; y < P; y++) {
      const int64_t first = y * T / P, last = ((y + 1) * T + P - 1) / P;
      double sum = 0;
      for (int64_t j = first; j < last; j++) sum += t.sums[j];
      const int64_t pairs = (end - begin) * (last - first);
      to[y * m.a->out.strides[3]] = pairs ? (float)(sum / (double)pairs) : 0.0f;
    }
  }

  static int run(const Map& m) {
    const Problem& p = m.p;
    const int64_t P = m.a->pool, workers = num_workers();
    const int64_t items = P ? P : (m.rows + BQ - 1) / BQ, width = P ? P : p.T;
    Tile* tiles = (Tile*)scratch(SCRATCH_HEAD, workers * sizeof(Tile));
    if (!tiles) return FASTTX_NO_MEMORY;
    memset((void*)tiles, 0, workers * sizeof(Tile));
    int status = FASTTX_OK;
    parallel_items(p.B * m.heads * items, workers, [&](int64_t worker, int64_t item) {
      Tile& t = tiles[worker];
      if (!make_tile(m, &t)) {
        __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
        return;
      }
      const int64_t batch = item / items / m.heads, which = item / items % m.heads;
      const int64_t x = item % items, head = Map::chosen(m.a->heads, which);
      const int64_t begin = P ? x : x * BQ, end = P ? x + 1 : min64(m.rows, begin + BQ);
      const auto missing = [&](int64_t row) {
        for (int64_t j = 0; j < width; j++) m.out(batch, which, row)[j] = NOT_A_NUMBER;
      };
      if (head < 0 || head >= p.H) {
        for (int64_t i = begin; i < end; i++) missing(i);
        return;
      }
      const Head h = make_head(p, batch, head);
      if (t.sequence != batch || t.head != head) {
        t.built = build_bias(p, h, t.bias);
        t.sequence = batch;
        t.head = head;
      }
      if (P) return pool_row(m, h, t.built, x, m.out(batch, which, x), t);
      for (int64_t i = begin, n; i < end; i += n) {
        n = m.run(i, end);
        if (m.row(i) < 0) missing(i);
        else write(m, h, t.built, m.row(i), n, m.out(batch, which, i), t);
      }
    });
    return status;
  }
};

}  // namespace

int attention_map_fwd(const fasttx_attention_map& args) {
  Map m = {make_problem(args.a), &args, 0, 0};
  m.heads = args.heads.data ? args.heads.sizes[0] : m.p.H;
  m.rows = args.rows.data ? args.rows.sizes[0] : m.p.S;
  if (m.p.B * m.heads * (args.pool ? 1 : m.rows * m.p.T) == 0) return FASTTX_OK;
  switch (args.a.q.dtype) {
    case FASTTX_F32:
      return Strips<float>::run(m);
    case FASTTX_BF16:
      return Strips<bf16>::run(m);
    case FASTTX_F16:
      return Strips<f16>::run(m);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
