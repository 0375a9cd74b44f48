// One id a row from softmax(logits / temperature) after top-k and top-p. A row is read from memory
// once, for its largest logit, and from the cache after that. Weights are integers (the formulas of
// fasttx/ops/sample.py), so that sums do not depend on their order.
#include "cpu/sample.h"

#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int32_t LIMIT = 40 << 24;
constexpr int BUCKET_SHIFT = 20, BUCKETS = (LIMIT >> BUCKET_SHIFT) + 1;
constexpr int64_t BLOCK = 512;  // logits whose weights are summed together
constexpr int64_t LEAST_ROOM = 1024;

typedef uint64_t vq __attribute__((vector_size(4 * W)));

// Products of the low 32 bits of every 64.
FASTTX_INLINE vq multiply(vq a, vq b) {
#if FASTTX_AVX512
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif FASTTX_AVX2
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

// Weights of distances, one in 64 bits.
FASTTX_INLINE vq mass(vq d) {
  const vq f = d & 0xffffff;
  vq h = 19732394 - (multiply(f, 2016033 - vq{}) >> 24);
  h = 118712301 - (multiply(h, f) >> 24);
  h = 515765849 - (multiply(h, f) >> 24);
  h = 1488511653 - (multiply(h, f) >> 24);
  h = 2147483487 - (multiply(h, f) >> 24);
  return (h << 7) >> (d >> 24);
}
struct Masses {
  vq even, odd;
};
FASTTX_INLINE Masses masses(vi d) { return {mass((vq)d & 0xffffffff), mass((vq)d >> 32)}; }
FASTTX_INLINE uint64_t sum(vq v) {
  uint64_t s = 0;
  for (int i = 0; i < W / 2; i++) s += v[i];
  return s;
}

// Integers in the order of the floats.
FASTTX_INLINE vu order_of(vf x) {
  const vi b = (vi)x;
  return (vu)(b ^ ((b >> 31) & 0x7fffffff)) ^ 0x80000000u;
}
FASTTX_INLINE float float_of(uint32_t order) {
  const int32_t b = (int32_t)(order ^ 0x80000000u);
  const int32_t bits = b ^ ((b >> 31) & 0x7fffffff);
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

struct Entry {
  uint32_t order;
  uint64_t mass;
};

// The largest order such that the entries from it on have at least this mass; the entries change
// places. One bit a step, from the first in which they differ.
uint32_t select(Entry* e, int64_t n, uint64_t target) {
  for (;;) {
    uint32_t all = e[0].order, some = e[0].order;
    for (int64_t i = 1; i < n; i++) all &= e[i].order, some |= e[i].order;
    if (all == some) return all;
    const uint32_t bit = 1u << (31 - __builtin_clz(all ^ some));
    int64_t ones = 0;
    uint64_t found = 0;
    for (int64_t i = 0; i < n; i++)
      if (e[i].order & bit) {
        const Entry t = e[i];
        e[i] = e[ones];
        e[ones++] = t;
        found += t.mass;
      }
    if (found >= target) {
      n = ones;
    } else {
      target -= found;
      e += ones;
      n -= ones;
    }
  }
}

template <class T>
struct Row {
  const T* x;
  int64_t V;
  float factor, peak, floor;  // logits below the floor weigh nothing

  FASTTX_INLINE vf at(int64_t i) const {
    return i + W <= V ? load(x + i) : load_partial(x + i, (int)(V - i));
  }
  FASTTX_INLINE vmask inside(int64_t i) const { return less(lane_index(), set1i((int)min64(W, V - i))); }

  // False where there is nothing to draw.
  bool find_peak() {
    vf m[4] = {set1(-INF), set1(-INF), set1(-INF), set1(-INF)};
    vmask number = less(vf{}, set1(1));
    int64_t i = 0;
    for (; i + 4 * W <= V; i += 4 * W)
      FASTTX_UNROLL(4)
      for (int u = 0; u < 4; u++) {
        const vf v = load(x + i + u * W);
        number = mask_and(number, equal(v, v));
        m[u] = max(m[u], v);
      }
    for (; i < V; i += W) {
      const vf v = fasttx::FASTTX_ISA::select(inside(i), at(i), set1(-INF));
      number = mask_and(number, equal(v, v));
      m[0] = max(m[0], v);
    }
    peak = hmax(max(max(m[0], m[1]), max(m[2], m[3])));
    return !any(mask_not(number) & less(vf{}, set1(1))) && peak > -INF;
  }

  int64_t first_peak() const {
    for (int64_t i = 0;; i += W)
      if (any(mask_and(inside(i), equal(at(i), set1(peak)))))
        for (int64_t c = i;; c++)
          if (to_float(x[c]) == peak) return c;
  }

  FASTTX_INLINE vi distance(int64_t i) const {
    const vf v = at(i);
    const vf y = min(set1((float)LIMIT), (set1(peak) - v) * set1(factor));
    const vmask top = equal(v, set1(peak));
    const vi d = __builtin_convertvector(zero_unless(mask_not(top), y), vi);
    const vmask out = i + W <= V ? less(v, set1(floor))
                                 : mask_or(less(v, set1(floor)), mask_not(inside(i)));
    return fasttx::FASTTX_ISA::select(out, set1i(LIMIT), d);
  }

  // The k-th largest logit. Candidates above the last k-th one found gather until there is no room.
  bool keep_top_k(int64_t k) {
    const int64_t room = max64(LEAST_ROOM, 2 * k);
    Entry* e = (Entry*)scratch(SCRATCH_PACK, (room + W) * sizeof(Entry));
    if (!e) return false;
    int64_t n = 0;
    float least = -INF;
    auto shrink = [&] {
      const uint32_t kth = fasttx::FASTTX_ISA::select(e, n, (uint64_t)k);
      least = float_of(kth);
      int64_t kept = 0;
      for (int64_t i = 0; i < n; i++)
        if (e[i].order > kth) e[kept++] = e[i];
      while (kept < k) e[kept++] = {kth, 1};
      n = k;
    };
    for (int64_t i = 0; i < V; i += W) {
      const vf v = at(i);
      vmask more = less(set1(least), v);
      if (i + W > V) more = mask_and(more, inside(i));
      if (!any(more)) continue;
      uint32_t order[W];
      store_int(order, (vi)order_of(v));
      for (int64_t c = i; c < min64(V, i + W); c++)
        if (to_float(x[c]) > least) e[n++] = {order[c - i], 1};
      if (n >= room) shrink();
    }
    if (n >= k) shrink(), floor = least;
    return true;
  }

  // The mass of each lane in order; false where all are out.
  FASTTX_INLINE bool lanes(int64_t i, vi* d, uint64_t* m) const {
    *d = distance(i);
    if (!any(less(*d, set1i(LIMIT)))) return false;
    const Masses w = masses(*d);
    for (int l = 0; l < W / 2; l++) m[2 * l] = w.even[l], m[2 * l + 1] = w.odd[l];
    return true;
  }

  bool keep_top_p(float p) {
    uint64_t bucket[BUCKETS] = {}, m[W], total = 0;
    vi d;
    for (int64_t i = 0; i < V; i += W) {
      if (!lanes(i, &d, m)) continue;
      for (int l = 0; l < W; l++) bucket[d[l] >> BUCKET_SHIFT] += m[l];
    }
    for (uint64_t b : bucket) total += b;
    int64_t target = (int64_t)((double)p * (double)total);
    target = min64(max64(1, target), (int64_t)total);
    int edge = 0;
    while ((int64_t)bucket[edge] < target) target -= bucket[edge++];
    Entry* e = (Entry*)scratch(SCRATCH_PACK, (V + W) * sizeof(Entry));
    if (!e) return false;
    int64_t n = 0;
    for (int64_t i = 0; i < V; i += W) {
      const vi at_edge = distance(i) >> BUCKET_SHIFT;
      if (!any(equal(at_edge, set1i(edge)))) continue;
      lanes(i, &d, m);
      uint32_t order[W];
      store_int(order, (vi)order_of(at(i)));
      for (int l = 0; l < W; l++)
        if (at_edge[l] == edge && m[l]) e[n++] = {order[l], m[l]};
    }
    floor = float_of(fasttx::FASTTX_ISA::select(e, n, (uint64_t)target));
    return true;
  }

  // The id at which the running sum of the weights passes u times their sum; -2 without memory.
  int64_t draw(double u) const {
    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    uint64_t* sums = (uint64_t*)scratch(SCRATCH_PACK, blocks * sizeof(uint64_t));
    if (!sums) return -2;
    uint64_t total = 0;
    for (int64_t b = 0; b < blocks; b++) {
      vq s[2] = {};
      for (int64_t i = b * BLOCK; i < min64(V, (b + 1) * BLOCK); i += W) {
        const vi d = distance(i);
        if (floor > -INF && !any(less(d, set1i(LIMIT)))) continue;
        const Masses w = masses(d);
        s[0] += w.even;
        s[1] += w.odd;
      }
      total += sums[b] = sum(s[0] + s[1]);
    }
    int64_t r = (int64_t)(u * (double)total);
    r = min64(r, (int64_t)total - 1);
    int64_t b = 0;
    while (r >= (int64_t)sums[b]) r -= sums[b++];
    uint64_t m[W];
    vi d;
    for (int64_t i = b * BLOCK;; i += W) {
      if (!lanes(i, &d, m)) continue;
      for (int l = 0; l < W; l++) {
        if (r < (int64_t)m[l]) return i + l;
        r -= m[l];
      }
    }
  }
};

// The leading 53 bits of the row's random words.
double uniform(const Dropout& key, int64_t row) {
  vu words[4];
  philox_words(key, vu{}, (uint32_t)row - vu{}, vu{}, vu{}, words);
  const uint64_t bits = (uint64_t)words[0][0] << 21 | words[1][0] >> 11;
  return (double)bits * 0x1p-53;
}

template <class T>
int64_t sample_row(const fasttx_sample& a, const Dropout& key, int64_t row) {
  const int64_t V = a.logits.sizes[1], stride = a.logits.strides[1];
  const T* x = (const T*)a.logits.data + row * a.logits.strides[0];
  if (stride != 1) {
    T* packed = (T*)scratch(SCRATCH_TILE, V * sizeof(T));
    if (!packed) return -2;
    for (int64_t c = 0; c < V; c++) packed[c] = x[c * stride];
    x = packed;
  }
  Row<T> r = {x, V, a.factor, 0, -INF};
  if (!r.find_peak()) return -1;
  if (a.greedy) return r.first_peak();
  if (a.top_k && !r.keep_top_k(a.top_k)) return -2;
  if (a.top_p < 1 && !r.keep_top_p(a.top_p)) return -2;
  return r.draw(uniform(key, row));
}

template <class T>
int sample_rows(const fasttx_sample& a) {
  const int64_t rows = a.logits.sizes[0], together = max64(1, 4096 / a.logits.sizes[1]);
  // A threshold that is never 0, for the keys alone.
  const Dropout key = a.greedy ? Dropout{} : make_dropout(0.5, a.seed);
  int status = FASTTX_OK;
  parallel_items((rows + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
    for (int64_t m = item * together; m < min64(rows, (item + 1) * together); m++) {
      a.ids[m] = sample_row<T>(a, key, m);
      if (a.ids[m] == -2) __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
    }
  });
  return status;
}

}  // namespace

int sample_fwd(const fasttx_sample& a) {
  switch (a.logits.dtype) {
    case FASTTX_F32:
      return sample_rows<float>(a);
    case FASTTX_BF16:
      return sample_rows<bf16>(a);
    case FASTTX_F16:
      return sample_rows<f16>(a);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
