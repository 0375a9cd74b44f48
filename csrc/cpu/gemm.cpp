#include "cpu/gemm.h"

#include "cpu/neighbours.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int64_t LINE = 16;  // units of a cache line

bool pairs(int32_t dtype) { return has_dpbf16 && dtype == FASTTX_BF16; }

template <class T>
constexpr bool PAIRS = false;
template <>
constexpr bool PAIRS<bf16> = has_dpbf16;

template <class T, int WIDTH>
void pack_block(const Operand& b, int64_t j, int64_t lanes, int64_t K, float* out) {
  constexpr int VECTORS = WIDTH / W;
  constexpr int64_t AHEAD = 16;
  const T* src = element<const T>(b, j, 0);
  if (b.column == 1) {
    if constexpr (PAIRS<T>) pack_lanes_pairs<VECTORS>(src, b.row, 1, lanes, K, (vi*)out);
    else pack_lanes<VECTORS>(src, b.row, int64_t{1}, lanes, K, (vf*)out);
    return;
  }
  // A few lines of each k, far from those of the next.
  for (int64_t k = 0; k < K; k += AHEAD) {
    const T* from = src + k * b.column;
    if (b.row == 1)
      for (int64_t n = AHEAD; n < 2 * AHEAD; n++)
        for (int64_t c = 0; c < WIDTH * (int64_t)sizeof(T); c += 64)
          __builtin_prefetch((const char*)(from + n * b.column) + c);
    const int64_t here = min64(AHEAD, K - k);
    if constexpr (PAIRS<T>)
      pack_row_pairs(from, b.column, b.row, here, lanes, WIDTH, (bf16*)(out + k / 2 * WIDTH));
    else
      pack_rows(from, b.column, b.row, here, lanes, WIDTH, out + k * WIDTH);
  }
}

// Units p .. p + W - 1 of rows i .. i + n - 1, n <= W, in vectors of rows.
template <class T>
FASTTX_INLINE vi unit_column(const Operand& a, int64_t i, int64_t p, int n, int64_t K) {
  if constexpr (PAIRS<T>) {
    const vu low = (vu)load_strided(element<const T>(a, i, 2 * p), a.row, n);
    const vu high = 2 * p + 1 < K ? (vu)load_strided(element<const T>(a, i, 2 * p + 1), a.row, n) : vu{};
    return (vi)(low >> 16 | high);
  } else {
    return (vi)load_strided(element<const T>(a, i, p), a.row, n);
  }
}

// Rows i .. i + n - 1 to out[r][ld], zeros from K on.
template <class T>
FASTTX_NOINLINE void pack_broadcast(const Operand& a, int64_t i, int n, int64_t K, int64_t ld,
                                    float* out) {
  if (a.column == 1) {
    const T* src = element<const T>(a, i, 0);
    if constexpr (PAIRS<T>) copy_rows(src, a.row, 1, n, K, 2 * ld, (bf16*)out);
    else pack_rows(src, a.row, int64_t{1}, n, K, ld, out);
    return;
  }
  const int64_t units = PAIRS<T> ? (K + 1) / 2 : K;
  for (int64_t p = 0; p < ld; p += W) {
    vi t[W];
    for (int c = 0; c < W; c++) t[c] = p + c < units ? unit_column<T>(a, i, p + c, n, K) : vi{};
    transpose(t);
    for (int r = 0; r < n; r++) store_int(out + r * ld + p, t[r]);
  }
}

template <class U, int R, int V>
FASTTX_NOINLINE void tiles(float* s, const float* a, int64_t row, int64_t rows, const float* lanes,
                           int64_t width, int64_t units, bool add) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    vf c[R][V] = {};
    const float* from = a + r * row;
    for (int64_t p = 0; p < units; p += LINE) {
      // The rows of the next tile, a line at a time: they come from far away.
      FASTTX_UNROLL(16)
      for (int next = R; next < 2 * R; next++) __builtin_prefetch(from + next * row + p);
      add_product<U>(c, from + p, row, 1, lanes + p * width, width, min64(LINE, units - p));
    }
    put(c, s + r * LANES, LANES, !add);
  }
  for (; r < rows; r++) {
    vf c[1][V];
    product<U>(c, a + r * row, row, 1, lanes, width, units);
    put(c, s + r * LANES, LANES, !add);
  }
}

template <class U>
void tile_rows(float* s, const float* a, int64_t row, int64_t rows, const float* lanes, int64_t width,
              int64_t units, int vecs, bool add) {
  int v = 0;
  for (; v + TILE_VECS <= vecs; v += TILE_VECS)
    tiles<U, TILE_ROWS, TILE_VECS>(s + v * W, a, row, rows, lanes + v * W, width, units, add);
  if (TILE_VECS > 2 && v + 2 <= vecs) {
    tiles<U, 8, 2>(s + v * W, a, row, rows, lanes + v * W, width, units, add);
    v += 2;
  }
  for (; v < vecs; v++)
    tiles<U, 8, 1>(s + v * W, a, row, rows, lanes + v * W, width, units, add);
}

}  // namespace

int64_t units_of(int32_t dtype, int64_t K) { return pairs(dtype) ? (K + 1) / 2 : K; }
int64_t padded_units(int32_t dtype, int64_t K) { return round_up(units_of(dtype, K), W); }

// Half as many lanes where LANES of them would fill the second level cache.
int block_lanes(int32_t dtype, int64_t K) { return units_of(dtype, K) > 3584 ? LANES / 2 : LANES; }

void pack_lane_block(const Operand& b, int64_t j, int64_t lanes, int64_t K, int width, float* out) {
  with_type(b.dtype, [&](auto t) {
    typedef decltype(t) T;
    if (width == LANES) pack_block<T, LANES>(b, j, lanes, K, out);
    else pack_block<T, LANES / 2>(b, j, lanes, K, out);
  });
}

int64_t broadcast_floats(const Operand& a, int64_t I, int64_t K) {
  const bool in_place = pairs(a.dtype) ? a.column == 1 && K % 2 == 0 && a.row % 2 == 0
                                       : a.column == 1 && a.dtype == FASTTX_F32;
  return in_place ? 0 : I * padded_units(a.dtype, K);
}

Broadcast broadcast(const Operand& a, int64_t I, int64_t K, float* memory) {
  if (!broadcast_floats(a, I, K))
    return {(const float*)a.data, pairs(a.dtype) ? a.row / 2 : a.row};
  const int64_t ld = padded_units(a.dtype, K);
  const int64_t blocks = (I + W - 1) / W, together = max64(1, 65536 / max64(1, W * ld));
  parallel_items((blocks + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
    for (int64_t b = item * together; b < min64(blocks, (item + 1) * together); b++)
      with_type(a.dtype, [&](auto t) {
        pack_broadcast<decltype(t)>(a, b * W, (int)min64(W, I - b * W), K, ld, memory + b * W * ld);
      });
  });
  return {memory, ld};
}

int64_t rows_together(int64_t units) { return units > CHUNK ? BLOCK_ROWS : STRIP; }

void product_rows(int32_t dtype, float* c, const Broadcast& a, int64_t i, int64_t rows,
                  const float* lanes, int width, int64_t units, int vecs, bool add) {
  if (units == 0 && !add) __builtin_memset(c, 0, rows * LANES * 4);
  const int64_t longest = pairs(dtype) ? CHUNK : CHAIN, chunks = (units + longest - 1) / longest;
  for (int64_t n = 0; n < chunks; n++) {
    const int64_t p = units * n / chunks, size = units * (n + 1) / chunks - p;
    const float* from = a.data + i * a.row + p;
    const float* to = lanes + p * width;
    if (pairs(dtype)) tile_rows<UnitBF16>(c, from, a.row, rows, to, width, size, vecs, add || n);
    else tile_rows<UnitF32>(c, from, a.row, rows, to, width, size, vecs, add || n);
  }
}

int multiply(const Term* terms, int count, int64_t I, int64_t J, Epilogue epilogue, void* context) {
  if (I == 0 || J == 0) return FASTTX_OK;
  if (count == 1 && I <= FEW_STRETCHES && terms[0].b.row == 1 && terms[0].b.column != 1)
    return multiply_stretches(terms[0], I, J, epilogue, context);
  if (count == 1 && I <= FEW && J >= FEWEST && terms[0].b.column == 1)
    return multiply_few(terms[0], I, J, epilogue, context);
  int64_t packed = 0, lane_units = 0, K = 0;
  for (int t = 0; t < count; t++) {
    packed += broadcast_floats(terms[t].a, I, terms[t].K);
    lane_units += padded_units(terms[t].b.dtype, terms[t].K);
    K += terms[t].K;
  }
  float* memory = nullptr;
  if (packed && !(memory = (float*)scratch(SCRATCH_SHARED, packed * 4))) return FASTTX_NO_MEMORY;
  Broadcast rows[2];
  for (int t = 0; t < count; t++) {
    rows[t] = broadcast(terms[t].a, I, terms[t].K, memory);
    memory += broadcast_floats(terms[t].a, I, terms[t].K);
  }
  const int width = count ? block_lanes(terms[0].b.dtype, K) : LANES;
  const int64_t blocks = (J + width - 1) / width, strips = (I + STRIP - 1) / STRIP;
  const int64_t workers = num_workers();
  // Few blocks are split between workers by rows.
  int64_t parts = workers == 1 ? 1 : min64(strips, (2 * workers + blocks - 1) / blocks);
  // Rows that the last cache does not hold are read once, 512 by 512.
  const bool once = blocks > 1 && I * lane_units * 4 > cache_bytes() / 2;
  if (once) parts = max64(parts, strips * STRIP / 512);
  bool failed = false;
  parallel_items(blocks * parts, workers, [&](int64_t, int64_t item) {
    const int64_t block = once ? item % blocks : item / parts, part = once ? item / blocks : item % parts;
    const int64_t j = block * width, lanes = min64(width, J - j);
    const int vecs = (int)((lanes + W - 1) / W);
    float* b = (float*)scratch(SCRATCH_PACK, lane_units * width * 4 + 64);
    if (!b) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    float* to = b;
    for (int t = 0; t < count; t++) {
      pack_lane_block(terms[t].b, j, lanes, terms[t].K, width, to);
      to += padded_units(terms[t].b.dtype, terms[t].K) * width;
    }
    alignas(64) float c[BLOCK_ROWS * LANES];
    const int64_t end = min64(I, strips * (part + 1) / parts * STRIP), step = rows_together(lane_units);
    for (int64_t i = strips * part / parts * STRIP; i < end; i += step) {
      const int64_t here = min64(step, end - i);
      const float* lane_block = b;
      for (int t = 0; t < count; t++) {
        product_rows(terms[t].b.dtype, c, rows[t], i, here, lane_block, width,
                     units_of(terms[t].b.dtype, terms[t].K), vecs, t > 0);
        lane_block += padded_units(terms[t].b.dtype, terms[t].K) * width;
      }
      for (int64_t r = 0; r < here; r += STRIP)
        epilogue(context, c + r * LANES, i + r, min64(STRIP, here - r), j, lanes);
    }
  });
  return failed ? FASTTX_NO_MEMORY : FASTTX_OK;
}

namespace {

template <class T>
void put_total(const Total& c, float* s, int64_t i, int64_t rows, int64_t j, int64_t lanes,
               int64_t J) {
  for (int64_t r = 0; r < rows; r++) {
    T* out = (T*)c.out + (i + r) * c.row + j * c.column;
    for (int64_t l = 0; l < LANES * (int64_t)sizeof(T); l += 64)
      __builtin_prefetch((const char*)(out + STRIP * c.row) + l, 1);
    float* sum = c.sum + (i + r) * J + j;
    for (int64_t l = 0; l < lanes; l += W) {
      const int n = (int)min64(W, lanes - l);
      vf x = load(s + r * LANES + l);
      if (!c.first) x += load_strided(sum + l, 1, n);
      if (c.last) store_strided(out + l * c.column, c.column, x, n);
      else store_strided(sum + l, 1, x, n);
    }
  }
}

struct TotalContext {
  const Total* total;
  int64_t J;
};

}  // namespace

int multiply_into(const Term* terms, int count, int64_t I, int64_t J, const Total& total) {
  TotalContext context = {&total, J};
  return multiply(
      terms, count, I, J,
      [](void* p, float* s, int64_t i, int64_t rows, int64_t j, int64_t lanes) {
        const TotalContext& c = *(const TotalContext*)p;
        with_type(c.total->dtype,
                  [&](auto t) { put_total<decltype(t)>(*c.total, s, i, rows, j, lanes, c.J); });
      },
      &context);
}

int add_rows(const Operand& a, int64_t M, int64_t N, const Total& total) {
  constexpr int64_t COLUMNS = 64;
  parallel_items((N + COLUMNS - 1) / COLUMNS, num_workers(), [&](int64_t, int64_t item) {
    const int64_t n0 = item * COLUMNS, n = min64(COLUMNS, N - n0);
    alignas(64) float sum[COLUMNS] = {};
    with_type(a.dtype, [&](auto t) {
      // Sums of pairs of pairs, so that long ones lose little.
      for (int64_t m = 0; m < M; m += 32)
        for (int64_t c = 0; c < n; c += W) {
          const int here = (int)min64(W, n - c);
          vf part[32];
          for (int64_t r = 0; r < 32; r++)
            part[r] = m + r < M ? load_strided(element<const decltype(t)>(a, m + r, n0 + c), a.column, here)
                                : vf{};
          FASTTX_UNROLL(5)
          for (int half = 16; half > 0; half /= 2)
            for (int r = 0; r < half; r++) part[r] += part[r + half];
          store(sum + c, load(sum + c) + part[0]);
        }
      for (int64_t c = 0; c < n; c++) {
        float x = sum[c];
        if (!total.first) x += total.sum[n0 + c];
        if (total.last) from_float(x, (decltype(t)*)total.out + (n0 + c) * total.column);
        else total.sum[n0 + c] = x;
      }
    });
  });
  return FASTTX_OK;
}

namespace {

// One vector of a row of weights, of `n` elements, and of x.
template <class T>
struct Dot {
  static constexpr int PER = PAIRS<T> ? 2 * W : W;
  static FASTTX_INLINE auto weights(const T* p) {
    if constexpr (PAIRS<T>) return load_int(p);
    else return load(p);
  }
  static FASTTX_INLINE auto tail(const T* p, int n) {
    if constexpr (PAIRS<T>) {
      T t[PER] = {};
      for (int i = 0; i < n; i++) t[i] = p[i];
      return load_int(t);
    } else {
      return load_partial(p, n);
    }
  }
  static FASTTX_INLINE vf mac(vf c, vi x, vi w) { return dpbf16(c, x, w); }
  static FASTTX_INLINE vf mac(vf c, vf x, vf w) { return fma(x, w, c); }
  static FASTTX_INLINE auto tokens(const float* p) {
    if constexpr (PAIRS<T>) return load_int(p);
    else return load(p);
  }
};

// Of R rows of w and TOKENS rows of x, UNROLL neighbours in K apart: W sums, whose lanes are added
// at the end. c continues what an earlier part of K left in `parts`.
template <class T, int R, int TOKENS, int UNROLL>
FASTTX_INLINE void dots(vf* parts, bool first, const float* x, int64_t x_row, const T* w,
                        int64_t row, int64_t K) {
  typedef Dot<T> D;
  constexpr int AHEAD = 16;  // rows: far enough for memory to answer
  vf c[W];
  FASTTX_UNROLL(16)
  for (int i = 0; i < W; i++) c[i] = first ? vf{} : parts[i];
  int64_t k = 0;
  for (; k + UNROLL * D::PER <= K; k += UNROLL * D::PER, x += UNROLL * W) {
    FASTTX_UNROLL(4)
    for (int u = 0; u < UNROLL; u++) {
      decltype(D::tokens(x)) y[TOKENS];
      FASTTX_UNROLL(16)
      for (int t = 0; t < TOKENS; t++) y[t] = D::tokens(x + t * x_row + u * W);
      FASTTX_UNROLL(16)
      for (int r = 0; r < R; r++) {
        const T* from = w + r * row + k + u * D::PER;
        __builtin_prefetch(from + AHEAD * row);
        const auto v = D::weights(from);
        FASTTX_UNROLL(16)
        for (int t = 0; t < TOKENS; t++) {
          vf& sum = c[(t * R + r) * UNROLL + u];
          sum = D::mac(sum, y[t], v);
        }
      }
    }
  }
  for (; k < K; k += D::PER, x += W)
    for (int r = 0; r < R; r++) {
      const T* from = w + r * row + k;
      const auto v = k + D::PER <= K ? D::weights(from) : D::tail(from, (int)(K - k));
      for (int t = 0; t < TOKENS; t++) {
        vf& sum = c[(t * R + r) * UNROLL];
        sum = D::mac(sum, D::tokens(x + t * x_row), v);
      }
    }
  FASTTX_UNROLL(16)
  for (int i = 0; i < W; i++) parts[i] = c[i];
}

// One token: the rows one after the other, as they lie in memory.
template <class T>
FASTTX_NOINLINE void one_token(float* s, const float* x, const T* w, int64_t row, int64_t count,
                               int64_t K) {
  typedef Dot<T> D;
  constexpr int UNROLL = 4;
  for (int64_t n = 0; n < count; n += W) {
    vf sums[W] = {};
    for (int64_t r = 0; r < min64(W, count - n); r++) {
      const T* from = w + (n + r) * row;
      vf c[UNROLL] = {};
      int64_t k = 0, p = 0;
      for (; k + UNROLL * D::PER <= K; k += UNROLL * D::PER, p += UNROLL * W)
        FASTTX_UNROLL(4)
        for (int u = 0; u < UNROLL; u++)
          c[u] = D::mac(c[u], D::tokens(x + p + u * W), D::weights(from + k + u * D::PER));
      for (; k + D::PER <= K; k += D::PER, p += W)
        c[0] = D::mac(c[0], D::tokens(x + p), D::weights(from + k));
      if (k < K) c[1] = D::mac(c[1], D::tokens(x + p), D::tail(from + k, (int)(K - k)));
      sums[r] = (c[0] + c[1]) + (c[2] + c[3]);
    }
    store(s + n, sum_lanes<W>(sums));
  }
}

template <class T, int TOKENS>
FASTTX_NOINLINE void few_tokens(float* s, const Broadcast& x, const T* w, int64_t row, int64_t count,
                                int64_t K) {
  if constexpr (TOKENS <= W) {
    constexpr int UNROLL = TOKENS >= 4 || W / TOKENS < 4 ? 1 : W / TOKENS / 4, R = W / TOKENS / UNROLL;
    // Rows done together, and the part of K for which their x stay in the first level cache.
    constexpr int64_t TOGETHER = 8 * R, PART = (int64_t)Dot<T>::PER * 32 * (TOKENS >= 4 ? 1 : 8 / TOKENS);
    for (int64_t n = 0; n < count; n += TOGETHER) {
      const int64_t end = min64(count, n + TOGETHER);
      vf parts[TOGETHER / R][W];
      // The last rows of an odd count are done with those before them, or one by one.
      const int64_t tiles = (end - n + R - 1) / R;
      const auto first_row = [&](int64_t tile) { return min64(n + tile * R, max64(0, end - R)); };
      for (int64_t k = 0; k < K || k == 0; k += PART)
        for (int64_t t = 0; t < tiles; t++)
          dots<T, R, TOKENS, UNROLL>(parts[t], k == 0, x.data + k / Dot<T>::PER * W, x.row,
                                     w + first_row(t) * row + k, row, min64(PART, K - k));
      for (int64_t tile = 0; tile < tiles; tile++) {
        vf* c = parts[tile];
        FASTTX_UNROLL(16)
        for (int i = 0; i < TOKENS * R; i++) {
          vf sum = c[i * UNROLL];
          FASTTX_UNROLL(4)
          for (int u = 1; u < UNROLL; u++) sum += c[i * UNROLL + u];
          c[i] = sum;
        }
        alignas(64) float sums[W];
        store(sums, sum_lanes<TOKENS * R>(c));
        for (int t = 0; t < TOKENS; t++)
          for (int r = 0; r < R; r++) s[t * LANES + first_row(tile) + r] = sums[t * R + r];
      }
    }
  }
}

}  // namespace

int64_t few_floats(int32_t dtype, int64_t M, int64_t K) { return M * padded_units(dtype, K); }

Broadcast pack_few(const Operand& x, int64_t M, int64_t K, float* memory) {
  const int64_t ld = padded_units(x.dtype, K);
  for (int64_t m = 0; m < M; m += W)
    with_type(x.dtype, [&](auto t) {
      pack_broadcast<decltype(t)>(x, m, (int)min64(W, M - m), K, ld, memory + m * ld);
    });
  return {memory, ld};
}

void few_rows(float* s, const Broadcast& x, int64_t M, const Operand& w, int64_t n, int64_t count,
              int64_t K) {
  if (count < FEWEST && M > 1) {
    // Together with the rows before them.
    float more[FEW * LANES];
    const int64_t extra = FEWEST - count;
    few_rows(more, x, M, w, n - extra, FEWEST, K);
    for (int64_t m = 0; m < M; m++)
      for (int64_t c = 0; c < count; c++) s[m * LANES + c] = more[m * LANES + extra + c];
    return;
  }
  with_type(w.dtype, [&](auto t) {
    typedef decltype(t) T;
    const T* rows = element<const T>(w, n, 0);
    for (int64_t m = 0; m < M;) {
      const Broadcast from = {x.data + m * x.row, x.row};
      float* to = s + m * LANES;
      if (W >= 8 && M - m >= 8) {
        few_tokens<T, 8>(to, from, rows, w.row, count, K);
        m += 8;
      } else if (M - m >= 4) {
        few_tokens<T, 4>(to, from, rows, w.row, count, K);
        m += 4;
      } else if (M - m >= 2) {
        few_tokens<T, 2>(to, from, rows, w.row, count, K);
        m += 2;
      } else {
        one_token<T>(to, from.data, rows, w.row, count, K);
        m += 1;
      }
    }
  });
}

int multiply_few(const Term& term, int64_t I, int64_t J, Epilogue epilogue, void* context) {
  float* memory = (float*)scratch(SCRATCH_SHARED, few_floats(term.a.dtype, I, term.K) * 4 + 64);
  if (!memory) return FASTTX_NO_MEMORY;
  const Broadcast a = pack_few(term.a, I, term.K, memory);
  parallel_neighbours((J + LANES - 1) / LANES, num_workers(), [&](int64_t, int64_t item) {
    const int64_t j = item * LANES, lanes = min64(LANES, J - j);
    alignas(64) float s[FEW * LANES] = {};
    few_rows(s, a, I, term.b, j, lanes, term.K);
    epilogue(context, s, 0, I, j, lanes);
  });
  return FASTTX_OK;
}

}  // namespace fasttx::FASTTX_ISA
