// Gradients of embed. dz, the gradient of the sum of the tables' rows, is computed for all rows from
// the tables and the statistics; without a norm and dropout it is dout itself. A table's gradient sums
// the rows of dz by id: the rows in a stable order of their ids are cut into chunks, runs of one id are
// summed within a chunk, and what a run has in several chunks is added in order.
#include <stdlib.h>
#include <sys/mman.h>

#include "cpu/embed_row.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int64_t CHUNK = 64;  // rows
enum { DWEIGHT = 8, DBIAS = 16 };

struct Entry {
  int64_t id, row;
};

// Entries by id, stable, by digits of 11 bits; `spare` has room for n. Returns where they ended up.
Entry* sort_by_id(Entry* from, Entry* spare, int64_t n, int64_t ids) {
  for (int shift = 0; shift < 63 && (ids - 1) >> shift > 0; shift += 11) {
    int64_t place[2048] = {};
    for (int64_t i = 0; i < n; i++) place[from[i].id >> shift & 2047]++;
    int64_t before = 0;
    for (int64_t& p : place) {
      const int64_t count = p;
      p = before;
      before += count;
    }
    for (int64_t i = 0; i < n; i++) spare[place[from[i].id >> shift & 2047]++] = from[i];
    Entry* sorted = spare;
    spare = from;
    from = sorted;
  }
  return from;
}

// Zeros, of which `writes` rows of row_bytes are written next. What was just mapped for a large output
// is given back to the system instead, which hands out zeros where they are touched: in large pages,
// unless so few rows are written that small ones take less time. The mark tells whether it did.
void zero(char* data, size_t bytes, int64_t writes, int64_t row_bytes) {
#ifdef MADV_DONTNEED
  constexpr int64_t LARGE_PAGE = 2 << 20, FAULTS = 64;  // small pages touched in the time of a large one
  if (bytes >= (32u << 20)) {
    const uintptr_t first = ((uintptr_t)data + 4095) & ~(uintptr_t)4095;
    const uintptr_t last = ((uintptr_t)data + bytes) & ~(uintptr_t)4095;
    volatile char* mark = (char*)first;
    *mark = 1;
    if (madvise((void*)first, last - first, MADV_DONTNEED) == 0 && *mark == 0) {
#ifdef MADV_HUGEPAGE
      if (writes * (1 + row_bytes / 4096) > (int64_t)bytes / LARGE_PAGE * FAULTS)
        madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
      memset(data, 0, first - (uintptr_t)data);
      memset((char*)last, 0, (uintptr_t)data + bytes - last);
      return;
    }
  }
#else
  (void)writes, (void)row_bytes;
#endif
  memset(data, 0, bytes);
}

template <class T>
FASTTX_INLINE vf load_column(const fasttx_rows& t, int64_t m, int64_t n, int live) {
  const T* p = row_at<T>(t, m) + n * t.column;
  return live >= W && t.column == 1 ? load(p) : load_strided(p, t.column, live);
}

// The sum of rows e[0].row .. e[n - 1].row of t, times `by`, to `out`.
template <class T, class To>
FASTTX_INLINE void sum_run(const fasttx_rows& t, const Entry* e, int64_t n, float by, To* out,
                           int64_t N) {
  const vf scale = set1(by);
  int64_t c = 0;
  if (t.column == 1)
    for (; c + 4 * W <= N; c += 4 * W) {
      vf s[4] = {};
      for (int64_t i = 0; i < n; i++) {
        const T* p = row_at<T>(t, e[i].row) + c;
        FASTTX_UNROLL(4)
        for (int u = 0; u < 4; u++) s[u] += load(p + u * W);
      }
      FASTTX_UNROLL(4)
      for (int u = 0; u < 4; u++) store(out + c + u * W, s[u] * scale);
    }
  for (; c < N; c += W) {
    const int live = (int)min64(W, N - c);
    vf s = {};
    for (int64_t i = 0; i < n; i++) s += load_column<T>(t, e[i].row, c, live);
    if (live == W) store(out + c, s * scale);
    else store_partial(out + c, s * scale, live);
  }
}

struct Table {
  const Entry* e;
  int64_t n, N;
  const fasttx_rows *dz, *gradient;
  float scale;
  float* partials;  // [chunks][2][N]: of the run that began before the chunk, of the one that goes on

  bool joined(int64_t i) const { return i > 0 && i < n && e[i - 1].id == e[i].id; }
  float* head(int64_t chunk) const { return partials + 2 * chunk * N; }
  float* tail(int64_t chunk) const { return head(chunk) + N; }
};

template <class T, class To>
void sum_chunk(const Table& t, int64_t chunk) {
  const int64_t end = min64(t.n, (chunk + 1) * CHUNK);
  for (int64_t i = chunk * CHUNK, next; i < end; i = next) {
    for (next = i + 1; next < end && t.joined(next); next++) {
    }
    const Entry* e = t.e + i;
    if (t.joined(i)) sum_run<T>(*t.dz, e, next - i, 1.0f, t.head(chunk), t.N);
    else if (t.joined(next)) sum_run<T>(*t.dz, e, next - i, 1.0f, t.tail(chunk), t.N);
    else sum_run<T>(*t.dz, e, next - i, t.scale, (To*)t.gradient->data + e->id * t.N, t.N);
  }
}

// A run that goes on after the chunk it began in.
template <class To>
void join_chunks(const Table& t, int64_t chunk) {
  const int64_t last = min64(t.n, (chunk + 1) * CHUNK) - 1;
  if (!t.joined(last + 1)) return;
  const int64_t first = chunk * CHUNK;
  if (t.joined(first) && t.e[first].id == t.e[last].id) return;
  float* total = t.tail(chunk);
  for (int64_t k = chunk + 1; k * CHUNK < t.n && t.joined(k * CHUNK) &&
                              t.e[k * CHUNK].id == t.e[last].id; k++) {
    const float* more = t.head(k);
    for (int64_t n = 0; n < t.N; n += W) {
      const int live = (int)min64(W, t.N - n);
      store_strided(total + n, 1, load_strided(total + n, 1, live) + load_strided(more + n, 1, live),
                    live);
    }
  }
  To* out = (To*)t.gradient->data + t.e[last].id * t.N;
  for (int64_t n = 0; n < t.N; n += W) {
    const int live = (int)min64(W, t.N - n);
    store_strided(out + n, 1, load_strided(total + n, 1, live) * set1(t.scale), live);
  }
}

int table_gradient(const Embedding& e, int which, const fasttx_rows& dz) {
  const fasttx_embed& a = *e.a;
  const fasttx_rows& gradient = a.dtable[which];
  const int64_t rows = a.rows[which], chunks = (e.M + CHUNK - 1) / CHUNK;
  const int64_t row_bytes = e.N * (gradient.dtype == FASTTX_F32 ? 4 : 2);
  zero((char*)gradient.data, rows * row_bytes, e.M, row_bytes);
  if (e.M == 0 || e.N == 0) return FASTTX_OK;
  const size_t entries = 2 * e.M * sizeof(Entry);
  char* memory = (char*)scratch(SCRATCH_PACK, entries + 2 * chunks * e.N * sizeof(float));
  if (!memory) return FASTTX_NO_MEMORY;
  Entry* list = (Entry*)memory;
  int64_t n = 0;
  for (int64_t m = 0; m < e.M; m++) {
    const int64_t id = id_of(a, which, m);
    if (id >= 0 && id < rows && id != a.padding[which]) list[n++] = {id, m};
  }
  const Entry* sorted = sort_by_id(list, list + e.M, n, rows);
  const Table t = {sorted, n, e.N, &dz, &gradient,
                   which == FASTTX_TOKEN ? (float)a.scale : 1.0f, (float*)(memory + entries)};
  const int64_t used = (n + CHUNK - 1) / CHUNK;
  with_type(dz, [&](auto from) {
    with_type(gradient, [&](auto to) {
      typedef decltype(from) T;
      typedef decltype(to) To;
      parallel_items(used, num_workers(), [&](int64_t, int64_t i) { sum_chunk<T, To>(t, i); });
      parallel_items(used, num_workers(), [&](int64_t, int64_t i) { join_chunks<To>(t, i); });
    });
  });
  return FASTTX_OK;
}

// dz [M][padded], or null where no table needs it; and the gradients of weight and bias.
int row_gradients(const Embedding& e, float* dz) {
  const fasttx_embed& a = *e.a;
  const int64_t N = e.N, padded = e.padded, floats = 2 * padded;
  const size_t bytes = 3 * padded * sizeof(float) + padded * sizeof(uint16_t);
  const float* sums = sum_rows(e.M, a.norm ? floats : 0, bytes, [&](int64_t m, float* sum,
                                                                    float* memory) {
    float *z = memory, *g = memory + padded, *d = dz ? dz + m * padded : memory + 2 * padded;
    uint16_t* numbers = (uint16_t*)(memory + 3 * padded);
    if (!a.norm) g = d;
    read_row<false>(a.dout, m, N, g);
    if (e.dropout.threshold) {
      philox_row(e.dropout, N, (uint32_t)m, 0, 0, numbers);
      drop_row(e.dropout, numbers, N, g);
    }
    if (!a.norm) return;
    prefetch_row(e, m + AHEAD);
    embed_row(e, m, z);
    const Moments row = {a.mean ? a.mean[m] : 0.0f, a.rstd[m]};
    norm_gradient(e.p.weight, row, e.rms, N, dz != nullptr, g, z, d, sum, sum + padded);
  });
  if (!sums) return FASTTX_NO_MEMORY;
  if (a.need & DWEIGHT) write_row(a.dnorm_weight, 0, N, sums);
  if (a.need & DBIAS) write_row(a.dnorm_bias, 0, N, sums + padded);
  return FASTTX_OK;
}

}  // namespace

int embed_bwd(const fasttx_embed& a) {
  Embedding e = {};
  if (!make_embedding(a, &e)) return FASTTX_NO_MEMORY;
  const bool tables = a.need & 7;
  fasttx_rows dz = a.dout;
  float* memory = nullptr;
  int status = FASTTX_OK;
  if (e.N && (a.norm || e.dropout.threshold)) {
    if (tables) {
      const size_t bytes = max64(1, e.M) * e.padded * sizeof(float);
      memory = (float*)aligned_alloc(64, bytes);
      if (!memory) return FASTTX_NO_MEMORY;
      dz = {memory, FASTTX_F32, 0, 0, {0, 0, e.padded}, 1};
    }
    status = row_gradients(e, memory);
  }
  for (int i = 0; i < FASTTX_TABLES && status == FASTTX_OK; i++)
    if (a.need >> i & 1) status = table_gradient(e, i, dz);
  free(memory);
  return status;
}

}  // namespace fasttx::FASTTX_ISA
