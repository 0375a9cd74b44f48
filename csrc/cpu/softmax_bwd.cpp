// Gradients of y = softmax(scale * x + mask) and of its logarithm, from y and the upstream dy:
//
//   d = y * (dy - sum(dy * y)), of the logarithm d = dy - exp(y) * sum(dy);  dx = scale * d
//
// without what is hidden (y 0, or -inf), whatever its dy. dmask sums d over the dimensions along which
// the mask repeats: rows that share a row of the mask are cut into parts, a function of the shape
// alone; each part is summed over groups of GROUP rows, then over groups, and parts in order.
#include <string.h>

#include "cpu/softmax_columns.h"
#include "cpu/stream.h"

namespace fasttx::FASTTX_ISA {

int softmax_bwd(const fasttx_softmax& a);

namespace {

constexpr int64_t GROUP = 8, MAX_PARTS = 64, MAX_PART_FLOATS = 1 << 22;

// d of n columns from y and dy, multiplied by `scale`; d may be either.
template <bool STREAM, class S, class D>
FASTTX_NOINLINE void gradients(const S* y, const S* dy, int64_t n, bool log, float scale, D* d) {
  const vf none = set1(log ? -INF : 0.0f), log2e = set1(LOG2E), by = set1(scale);
  vf sum[4] = {};
  int64_t i = 0;
  const auto add = [&](vf z, vf g) { return zero_unless(mask_not(equal(z, none)), log ? g : g * z); };
  for (; i + 4 * W <= n; i += 4 * W) {
    FASTTX_UNROLL(4)
    for (int u = 0; u < 4; u++) sum[u] += add(load(y + i + u * W), load(dy + i + u * W));
  }
  for (; i < n; i += W) {
    const int rest = (int)min64(W, n - i);
    sum[0] += first(rest, add(load_partial(y + i, rest), load_partial(dy + i, rest)));
  }
  const vf total = set1(sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])));
  const auto at = [&](vf z, vf g) {
    const vf v = log ? fnma(exp2<6>(z * log2e), total, g) : z * (g - total);
    return zero_unless(mask_not(equal(z, none)), v * by);
  };
  i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
    store_two<STREAM>(d + i, at(load(y + i), load(dy + i)), at(load(y + i + W), load(dy + i + W)));
  for (; i < n; i += W) {
    const int rest = (int)min64(W, n - i);
    store_partial(d + i, at(load_partial(y + i, rest), load_partial(dy + i, rest)), rest);
  }
}

struct Buffers {
  float *y, *dy;
};

enum Way { ANY, SIDE_BY_SIDE, STREAMING };

bool side_by_side(const fasttx_softmax& a) {
  return a.out.dtype == a.dout.dtype && a.out.dtype == a.dx.dtype && a.out.strides[3] == 1 &&
         a.dout.strides[3] == 1 && a.dx.strides[3] == 1;
}

// dx of one row, or d in b.dy.
template <bool DX>
void row_gradient(const Problem& p, const Row& r, const Buffers& b, Way way) {
  const fasttx_softmax& a = *p.a;
  const int64_t live = seen(p, r.i[2]);
  const float scale = (float)a.scale;
  if (DX && way != ANY) {
    with_type(a.out.dtype, [&](auto type) {
      typedef decltype(type) T;
      const T *y = address<T>(a.out, r), *dy = address<T>(a.dout, r);
      T* dx = address<T>(a.dx, r);
      if (FASTTX_AVX512 && way == STREAMING)
        gradients<FASTTX_AVX512>(y, dy, live, a.log, scale, dx);
      else gradients<false>(y, dy, live, a.log, scale, dx);
    });
  } else {
    read_row(a.out, r, 0, live, b.y);
    read_row(a.dout, r, 0, live, b.dy);
    gradients<false>(b.y, b.dy, live, a.log, DX ? scale : 1.0f, b.dy);
    if (DX) write_row(a.dx, r, 0, live, b.dy);
    else
      for (int64_t n = live; n < p.N; n++) b.dy[n] = 0.0f;
  }
  if (DX && live < p.N) fill_row(a.dx, r, live, p.N, 0.0f);
}

void scale_row(const Problem& p, const Row& r, const Buffers& b) {
  const vf by = set1((float)p.a->scale);
  for (int64_t n = 0; n < p.N; n += W) store(b.y + n, load(b.dy + n) * by);
  write_row(p.a->dx, r, 0, p.N, b.y);
}

// The rows of x that share a row of the mask: kept + shared gives the indices of a row.
struct Sharing {
  int64_t kept[3], shared[3];
  int64_t units, rows;
  int64_t columns;  // of the mask: N or 1
  int64_t parts, part_rows;

  Row row(int64_t unit, int64_t x) const {
    const Row a = row_at(kept, unit), b = row_at(shared, x);
    return {{a.i[0] + b.i[0], a.i[1] + b.i[1], a.i[2] + b.i[2]}};
  }
};

Sharing make_sharing(const fasttx_softmax& a) {
  Sharing s = {};
  s.units = s.rows = 1;
  for (int d = 0; d < 3; d++) {
    s.kept[d] = a.dmask.sizes[d];
    s.shared[d] = a.dmask.sizes[d] == a.x.sizes[d] ? 1 : a.x.sizes[d];
    s.units *= s.kept[d];
    s.rows *= s.shared[d];
  }
  s.columns = a.dmask.sizes[3];
  const int64_t memory = MAX_PART_FLOATS / max64(1, s.units * s.columns);
  const int64_t most = max64(1, min64(MAX_PARTS / max64(1, s.units), memory));
  s.part_rows = max64(1, s.rows);
  if (s.rows > GROUP) s.part_rows = round_up((s.rows + most - 1) / most, GROUP);
  s.parts = max64(1, (s.rows + s.part_rows - 1) / s.part_rows);
  return s;
}

// Sums of rows [begin, end) of a unit into total [columns]; also writes their dx.
void sum_part(const Problem& p, const Sharing& s, int64_t unit, int64_t begin, int64_t end,
              const Buffers& b, float* group, float* total) {
  const int64_t n = s.columns;
  memset(total, 0, n * sizeof(float));
  for (int64_t x = begin; x < end; x++) {
    if ((x - begin) % GROUP == 0) memset(group, 0, n * sizeof(float));
    const Row r = s.row(unit, x);
    row_gradient<false>(p, r, b, ANY);
    if (p.a->dx.data) scale_row(p, r, b);
    if (n == p.N) {
      for (int64_t c = 0; c < n; c += W) store(group + c, load(group + c) + load(b.dy + c));
    } else {
      vf sum = {};
      for (int64_t c = 0; c < p.N; c += W) sum += first(p.N - c, load(b.dy + c));
      group[0] += sum_lanes(sum);
    }
    if ((x + 1 - begin) % GROUP == 0 || x + 1 == end)
      for (int64_t c = 0; c < n; c += W) store(total + c, load(total + c) + load(group + c));
  }
}

int mask_gradient(const Problem& p) {
  const fasttx_softmax& a = *p.a;
  const Sharing s = make_sharing(a);
  const int64_t padded = round_up(p.N, W) + W, columns = round_up(s.columns, W) + W;
  float* partials = nullptr;
  if (s.parts > 1) {
    partials = (float*)scratch(SCRATCH_SHARED, s.units * s.parts * columns * sizeof(float));
    if (!partials) return FASTTX_NO_MEMORY;
  }
  int status = FASTTX_OK;
  const int64_t work = max64(1, s.part_rows * p.N), together = max64(1, ITEM / work);
  const int64_t count = s.units * s.parts;
  parallel_items((count + together - 1) / together, num_workers(), [&](int64_t, int64_t item) {
    float* memory = (float*)scratch(SCRATCH_TILE, (2 * padded + 2 * columns) * sizeof(float));
    if (!memory) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    float* group = memory + 2 * padded;
    for (int64_t x = item * together; x < min64(count, (item + 1) * together); x++) {
      const int64_t unit = x / s.parts, begin = x % s.parts * s.part_rows;
      float* total = partials ? partials + x * columns : group + columns;
      sum_part(p, s, unit, begin, min64(s.rows, begin + s.part_rows), {memory, memory + padded},
               group, total);
      if (!partials) write_row(a.dmask, row_at(s.kept, unit), 0, s.columns, total);
    }
  });
  for (int64_t u = 0; partials && status == FASTTX_OK && u < s.units; u++) {
    float* total = partials + u * s.parts * columns;
    for (int64_t x = 1; x < s.parts; x++)
      for (int64_t c = 0; c < s.columns; c += W)
        store(total + c, load(total + c) + load(total + x * columns + c));
    write_row(a.dmask, row_at(s.kept, u), 0, s.columns, total);
  }
  return status;
}

}  // namespace

int softmax_bwd(const fasttx_softmax& a) {
  const Problem p = make_problem(a);
  if (a.dmask.data) return mask_gradient(p);
  if (p.M * p.N == 0) return FASTTX_OK;
  const int lanes = lane_dimension(a.out, a.dx);
  if (lanes >= 0) return softmax_columns_bwd(a, lanes);
  Way way = side_by_side(a) ? SIDE_BY_SIDE : ANY;
  if (way == SIDE_BY_SIDE && streams(a.dx, 3 * p.M * p.N)) way = STREAMING;
  const int64_t padded = round_up(p.N, W) + W;
  int status = FASTTX_OK;
  each_row(p, [&](Row r, int64_t count) {
    float* memory = nullptr;
    if (way == ANY) memory = (float*)scratch(SCRATCH_TILE, 2 * padded * sizeof(float));
    if (way == ANY && !memory) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    for (; count; count--, r = next_row(a.x.sizes, r))
      row_gradient<true>(p, r, {memory, memory + padded}, way);
    if (way == STREAMING) end_of_stream();
  });
  return status;
}

}  // namespace fasttx::FASTTX_ISA
