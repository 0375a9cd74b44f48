// A few queries of each sequence against its long cache, split over the keys; reading the cache is
// all that should cost. Lanes hold head dimensions: products with keys are dot products along D,
// reduced W keys at a time, products with values are rows of V times a broadcast probability. A row
// visits only the keys it sees, so nothing hidden is read.
#include "cpu/attention_decode.h"

#include <string.h>

#include "cpu/attention_decode_products.h"
#include "cpu/parallel.h"

namespace fasttx::FASTTX_ISA {

int attention_decode_fwd(const fasttx_decode& args);
int cache_append(const fasttx_decode& args);

namespace {

// Keys whose scores a row holds at once, and keys of an item of work at few rows. Neither depends
// on the number of threads or on the other sequences, so the bits of a result do not.
constexpr int64_t CHUNK = 512, SPLIT = 512;
constexpr int64_t PREFETCH_BYTES = 4096;

struct Decode {
  const fasttx_decode* a;
  int64_t B, H, G, S, D, Dv, T, page;
  int64_t group, rows;  // rows of queries that share a key head: group heads x S
  int64_t width;        // floats of a row's sums
  int64_t split;
  int64_t reach;           // M of the relative bias
  const float* diagonals;  // [H][2 * M + 1] relative bias by distance, times log2(e)
  int64_t ahead;           // bytes to prefetch, 0: none
};

struct Range {
  int64_t begin, end;
};

// The sums of one row over the keys of an item: values [width], then peak and total.
struct Sums {
  float* acc;
  float *peak, *total;
};

int32_t element(const fasttx_tensor& t, int64_t i) {
  return ((const int32_t*)t.data)[i * t.strides[0]];
}
int64_t length_of(const Decode& p, int64_t b) {
  return max64(0, min64(p.T, element(p.a->lengths, b)));
}

// The keys that query i of sequence b sees.
Range row_keys(const Decode& p, int64_t b, int64_t i) {
  const int64_t length = length_of(p, b), place = length - p.S + i;
  Range r = {p.a->start.data ? max64(0, element(p.a->start, b)) : 0, length};
  if (p.a->left >= 0) r.begin = max64(r.begin, place - min64(place, p.a->left));
  if (p.a->right >= 0) r.end = min64(r.end, place + min64(p.T, p.a->right) + 1);
  if (place < 0 || r.end < r.begin) r.end = r.begin;
  return r;
}
// The keys that some query of sequence b sees.
Range sequence_keys(const Decode& p, int64_t b) {
  Range all = {p.T, 0};
  for (int64_t i = 0; i < p.S; i++) {
    const Range r = row_keys(p, b, i);
    if (r.begin == r.end) continue;
    all = {min64(all.begin, r.begin), max64(all.end, r.end)};
  }
  return all.end < all.begin ? Range{0, 0} : all;
}
int64_t splits_of(const Decode& p, Range keys) {
  return max64(1, (keys.end - keys.begin + p.split - 1) / p.split);
}

Sums sums_at(const Decode& p, float* memory, int64_t item, int64_t row) {
  float* acc = memory + (item * p.rows + row) * (p.width + W);
  return {acc, acc + p.width, acc + p.width + 1};
}

template <class E>
struct Rows {
  const E* data;
  int64_t stride, count;  // count 0: no such page
};
// As many of positions j .. end - 1 of a cache as lie one after the other.
template <class E>
Rows<E> cache_rows(const Decode& p, const fasttx_tensor& cache, int64_t b, int64_t g, int64_t j,
                   int64_t end, E* buffer) {
  int64_t owner = b, at = j, count = end - j;
  if (p.a->block_table.data) {
    const fasttx_tensor& t = p.a->block_table;
    owner = ((const int32_t*)t.data)[b * t.strides[0] + j / p.page * t.strides[1]];
    at = j % p.page;
    count = min64(count, p.page - at);
    if (owner < 0 || owner >= cache.sizes[0]) return {nullptr, 0, count};
  }
  const E* data = (const E*)cache.data + owner * cache.strides[0] + g * cache.strides[1] +
                  at * cache.strides[2];
  if (cache.strides[3] == 1 || cache.sizes[3] == 1) return {data, cache.strides[2], count};
  for (int64_t r = 0; r < count; r++)
    for (int64_t d = 0; d < cache.sizes[3]; d++)
      buffer[r * cache.sizes[3] + d] = data[r * cache.strides[2] + d * cache.strides[3]];
  return {buffer, cache.sizes[3], count};
}

// Raw scores s[0 .. n) of keys j .. j+n-1 to logits times log2(e); the largest is returned.
float logits(const Decode& p, int64_t b, int64_t head, int64_t place, int64_t j, int64_t n,
             float* s) {
  const fasttx_decode& a = *p.a;
  const bool capped = a.softcap > 0;
  const vf inner = set1((float)(capped ? a.scale / a.softcap : a.scale * LOG2E));
  const vf outer = set1((float)a.softcap * LOG2E);
  const auto slope_stride = a.slopes.sizes[0] == 1 ? 0 : a.slopes.strides[0];
  const float slope =
      a.slopes.data ? ((const float*)a.slopes.data)[b * slope_stride + head * a.slopes.strides[1]]
                    : 0.0f;
  const int64_t position_stride = a.positions.sizes[0] == 1 ? 0 : a.positions.strides[0];
  const float* positions =
      a.positions.data ? (const float*)a.positions.data + b * position_stride : nullptr;
  const float* diagonal = p.diagonals ? p.diagonals + head * (2 * p.reach + 1) + p.reach : nullptr;
  const vf step = __builtin_convertvector(lane_index(), vf);
  vf peak = set1(-INF);
  for (int64_t x = 0; x < n; x += W) {
    const int here = (int)min64(W, n - x);
    vf v = load(s + x) * inner;
    if (capped) v = tanh(v) * outer;
    if (a.slopes.data) {
      // Within a row only differences count; distances keep more digits than positions.
      const vf at = positions ? load_strided(positions + (j + x) * a.positions.strides[1],
                                             a.positions.strides[1], here)
                              : step + set1((float)(j + x - place));
      v += set1(slope) * at * set1(LOG2E);
    }
    if (diagonal) {
      const int64_t first = j + x - place;
      if (first + W - 1 <= -p.reach) {
        v += set1(diagonal[-p.reach]);
      } else if (first >= p.reach) {
        v += set1(diagonal[p.reach]);
      } else if (first >= -p.reach && first + W - 1 <= p.reach) {
        v += load(diagonal + first);
      } else {
        float t[W];
        for (int i = 0; i < W; i++) t[i] = diagonal[max64(-p.reach, min64(p.reach, first + i))];
        v += load(t);
      }
    }
    if (here < W) v = select(less(lane_index(), set1i(here)), v, set1(-INF));
    peak = max(v, peak);
    store(s + x, v);
  }
  return hmax(peak);
}

float exp2_of(float x) { return exp2<6>(set1(x))[0]; }

// The sums of one row, query i of `head`, over keys j .. end - 1, a chunk, added to what it has.
template <class E>
void add_chunk(const Decode& p, int64_t b, int64_t head, int64_t i, const typename Kept<E>::query* q, int64_t j,
               int64_t end, float* s, E* buffer, Sums sums) {
  const int64_t n = end - j, g = head / p.group;
  bool missing = false;
  for (int64_t at = j; at < end;) {
    const Rows<E> k = cache_rows(p, p.a->k, b, g, at, end, buffer);
    if (k.data) score(q, k.data, k.stride, k.count, p.D, s + at - j, p.ahead);
    else missing = true;
    at += k.count;
  }
  if (missing)
    for (int64_t at = j; at < end;) {
      const Rows<E> k = cache_rows(p, p.a->k, b, g, at, end, buffer);
      for (int64_t x = 0; !k.data && x < k.count; x++) s[at - j + x] = 0.0f;
      at += k.count;
    }
  float peak = logits(p, b, head, length_of(p, b) - p.S + i, j, n, s);
  if (missing) {
    peak = -INF;
    for (int64_t at = j; at < end;) {
      const Rows<E> k = cache_rows(p, p.a->k, b, g, at, end, buffer);
      for (int64_t x = 0; x < k.count; x++) {
        float& v = s[at - j + x];
        if (!k.data) v = -INF;
        peak = v > peak ? v : peak;
      }
      at += k.count;
    }
  }
  peak = peak > *sums.peak ? peak : *sums.peak;
  const float shift = peak == -INF ? 0.0f : peak;
  const float decay = exp2_of(*sums.peak - shift);
  vf total = vf{};
  for (int64_t x = 0; x < n; x += W) {
    const vf v = exp2<Kept<E>::degree>(load(s + x) - set1(shift));
    total += v;
    store((typename Kept<E>::weight*)s + x, v);
  }
  *sums.peak = peak;
  *sums.total = *sums.total * decay + hsum(total);
  if (decay != 1.0f)
    for (int64_t c = 0; c < p.width; c += W) store(sums.acc + c, load(sums.acc + c) * set1(decay));
  for (int64_t at = j; at < end;) {
    const Rows<E> v = cache_rows(p, p.a->v, b, g, at, end, buffer);
    if (v.data)
      weigh((const typename Kept<E>::weight*)s + (at - j), v.data, v.stride, v.count, p.Dv,
            sums.acc, p.ahead);
    at += v.count;
  }
}

// Adds up the splits of one row in their order and rounds once.
template <class E>
void merge_row(const Decode& p, int64_t b, int64_t head, int64_t i, int64_t row, int64_t first,
               int64_t splits, float* memory, float* sum) {
  const fasttx_tensor& o = p.a->out;
  E* out = (E*)o.data + b * o.strides[0] + head * o.strides[1] + i * o.strides[2];
  const Range keys = row_keys(p, b, i);
  for (int64_t c = 0; c < p.width; c += W) store(sum + c, vf{});
  float total = 1.0f;
  if (keys.begin < keys.end) {
    float peak = -INF;
    for (int64_t x = 0; x < splits; x++) {
      const float each = *sums_at(p, memory, first + x, row).peak;
      peak = each > peak ? each : peak;
    }
    total = 0.0f;
    for (int64_t x = 0; x < splits; x++) {
      const Sums sums = sums_at(p, memory, first + x, row);
      const float weight = exp2_of(*sums.peak - (peak == -INF ? 0.0f : peak));
      total += weight * *sums.total;
      for (int64_t c = 0; c < p.width; c += W)
        store(sum + c, fma(set1(weight), load(sums.acc + c), load(sum + c)));
    }
    if (total == 0.0f) total = 1.0f;
  }
  in_order<E>(sum, p.width);
  for (int64_t c = 0; c < p.Dv; c += W)
    store_strided(out + c * o.strides[3], o.strides[3], load(sum + c) / set1(total),
                  (int)min64(W, p.Dv - c));
}

template <class E>
int decode(Decode& p) {
  const fasttx_decode& a = *p.a;
  p.width = round_up(p.Dv, Kept<E>::columns);
  const int64_t q_width = round_up(p.D, Kept<E>::columns), diagonal = 2 * p.reach + 1;
  // first[b]: the number of the first item of sequence b; left[b, g]: splits not yet done.
  const size_t before = sizeof(int64_t) * (p.B + 1) + sizeof(int64_t) * p.B * p.G;
  int64_t items = 0, keys = 0;
  for (int64_t b = 0; b < p.B; b++) {
    const Range r = sequence_keys(p, b);
    items += p.G * splits_of(p, r);
    keys += p.G * (r.end - r.begin);
  }
  const size_t header = round_up(before, 64);
  const size_t bias = p.a->table.data ? round_up(sizeof(float) * p.H * diagonal, 64) : 0;
  char* shared = (char*)scratch(
      SCRATCH_SHARED, header + bias + sizeof(float) * items * p.rows * (p.width + W));
  if (!shared) return FASTTX_NO_MEMORY;
  int64_t* first = (int64_t*)shared;
  int64_t* left = first + p.B + 1;
  float* memory = (float*)(shared + header + bias);
  first[0] = 0;
  for (int64_t b = 0; b < p.B; b++) {
    const int64_t splits = splits_of(p, sequence_keys(p, b));
    first[b + 1] = first[b] + p.G * splits;
    for (int64_t g = 0; g < p.G; g++) left[b * p.G + g] = splits;
  }
  if (bias) {
    float* d = (float*)(shared + header);
    p.diagonals = d;
    for (int64_t t = 0; t < diagonal; t++) {
      const int64_t bucket = ((const int32_t*)a.lut.data)[t * a.lut.strides[0]];
      for (int64_t h = 0; h < p.H; h++)
        d[h * diagonal + t] = table_value(a.table, bucket, h) * LOG2E;
    }
  }
  const int64_t bytes = keys * (p.D + p.Dv) * (int64_t)sizeof(E);
  p.ahead = bytes > cache_bytes() * 3 / 4 ? PREFETCH_BYTES : 0;

  int failed = 0;
  parallel_items(items, num_workers(), [&](int64_t, int64_t item) {
    int64_t b = 0;
    for (int64_t end = p.B; end - b > 1;) {
      const int64_t middle = (b + end) / 2;
      if (first[middle] <= item) b = middle;
      else end = middle;
    }
    const int64_t splits = (first[b + 1] - first[b]) / p.G;
    const int64_t g = (item - first[b]) / splits, split = (item - first[b]) % splits;
    const Range all = sequence_keys(p, b);
    const int64_t begin = all.begin + split * p.split, end = min64(all.end, begin + p.split);
    const size_t q_bytes = round_up(sizeof(typename Kept<E>::query) * p.rows * q_width, 64);
    const size_t s_bytes = sizeof(float) * (CHUNK + W);
    char* tile = (char*)scratch(SCRATCH_TILE, q_bytes + s_bytes + sizeof(float) * p.width +
                                                  sizeof(E) * CHUNK * max64(p.D, p.Dv));
    if (!tile) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    auto q = (typename Kept<E>::query*)tile;
    float* s = (float*)(tile + q_bytes);
    float* sum = s + CHUNK + W;
    E* buffer = (E*)(sum + p.width);
    for (int64_t row = 0; row < p.rows; row++) {
      const E* from = (const E*)a.q.data + b * a.q.strides[0] +
                      (g * p.group + row / p.S) * a.q.strides[1] + row % p.S * a.q.strides[2];
      prepare(from, a.q.strides[3], p.D, q_width, q + row * q_width);
      const Sums sums = sums_at(p, memory, item, row);
      for (int64_t c = 0; c < p.width; c += W) store(sums.acc + c, vf{});
      *sums.peak = -INF;
      *sums.total = 0.0f;
    }
    for (int64_t j = begin; j < end; j += CHUNK)
      for (int64_t row = 0; row < p.rows; row++) {
        const int64_t i = row % p.S;
        const Range r = row_keys(p, b, i);
        const int64_t from = max64(j, r.begin), to = min64(min64(end, j + CHUNK), r.end);
        if (from < to)
          add_chunk(p, b, g * p.group + row / p.S, i, q + row * q_width, from, to, s, buffer,
                    sums_at(p, memory, item, row));
      }
    if (__atomic_sub_fetch(&left[b * p.G + g], 1, __ATOMIC_ACQ_REL) == 0)
      for (int64_t row = 0; row < p.rows; row++)
        merge_row<E>(p, b, g * p.group + row / p.S, row % p.S, row, item - split, splits, memory,
                     sum);
  });
  return failed ? FASTTX_NO_MEMORY : FASTTX_OK;
}

// One token's rows of all heads, of keys or of values.
void append_token(const fasttx_tensor& cache, const fasttx_tensor& fresh, int64_t owner, int64_t at,
                  int64_t b, int64_t s, int64_t size) {
  for (int64_t g = 0; g < fresh.sizes[1]; g++) {
    char* to = (char*)cache.data + size * (owner * cache.strides[0] + g * cache.strides[1] +
                                           at * cache.strides[2]);
    const char* from = (const char*)fresh.data + size * (b * fresh.strides[0] +
                                                         g * fresh.strides[1] + s * fresh.strides[2]);
    if (cache.strides[3] == 1 && fresh.strides[3] == 1) {
      memcpy(to, from, size * fresh.sizes[3]);
      continue;
    }
    for (int64_t d = 0; d < fresh.sizes[3]; d++)
      memcpy(to + size * d * cache.strides[3], from + size * d * fresh.strides[3], size);
  }
}

}  // namespace

int attention_decode_fwd(const fasttx_decode& a) {
  Decode p = {};
  p.a = &a;
  p.B = a.q.sizes[0];
  p.H = a.q.sizes[1];
  p.S = a.q.sizes[2];
  p.D = a.q.sizes[3];
  p.G = a.k.sizes[1];
  p.Dv = a.v.sizes[3];
  p.page = a.k.sizes[2];
  p.T = a.block_table.data ? a.block_table.sizes[1] * p.page : p.page;
  if (p.B * p.H * p.S * p.Dv == 0) return FASTTX_OK;
  p.group = p.H / p.G;
  p.rows = p.group * p.S;
  // More rows make an item dearer and its sums larger: fewer of them.
  p.split = SPLIT * ((p.rows + 7) / 8);
  p.reach = a.lut.data ? a.lut.sizes[0] / 2 : 0;
  switch (a.q.dtype) {
    case FASTTX_F32:
      return decode<float>(p);
    case FASTTX_BF16:
      return decode<bf16>(p);
    case FASTTX_F16:
      return decode<f16>(p);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

int cache_append(const fasttx_decode& a) {
  if (a.k.dtype > FASTTX_F16) return FASTTX_BAD_DTYPE;
  const int64_t B = a.k_new.sizes[0], S = a.k_new.sizes[2], page = a.k.sizes[2];
  const int64_t size = a.k.dtype == FASTTX_F32 ? 4 : 2, token = size * a.k_new.sizes[1] *
                       (a.k_new.sizes[3] + a.v_new.sizes[3]);
  const int64_t T = a.block_table.data ? a.block_table.sizes[1] * page : page;
  const int64_t together = max64(1, (64 << 10) / max64(1, token));
  parallel_items((B * S + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
    for (int64_t x = item * together; x < min64(B * S, (item + 1) * together); x++) {
      const int64_t b = x / S, s = x % S, place = element(a.lengths, b) - S + s;
      if (place < 0 || place >= T) continue;
      int64_t owner = b, at = place;
      if (a.block_table.data) {
        const fasttx_tensor& t = a.block_table;
        owner = ((const int32_t*)t.data)[b * t.strides[0] + place / page * t.strides[1]];
        at = place % page;
        if (owner < 0 || owner >= a.k.sizes[0]) continue;
      }
      append_token(a.k, a.k_new, owner, at, b, s, size);
      append_token(a.v, a.v_new, owner, at, b, s, size);
    }
  });
  return FASTTX_OK;
}

}  // namespace fasttx::FASTTX_ISA
