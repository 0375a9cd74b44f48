// What linear and ffn do beside the products: upstream gradients with their sums over rows; and the
// choice of the kernels of a card.
#include "cuda/gemm.h"

#include "cuda/rows.h"
#include "cuda/tile/activation.h"
#include "cuda/tile/panel.h"

namespace fasttx {
namespace {

constexpr int THREADS = 256, MOST_PARTS = 32;

// A thread has eight columns of every eighth row of a part.
constexpr int GROUPS = 32, ROWS = THREADS / GROUPS, ROW_PARTS = 256;

struct Upstream {
  Panel dout, pre, dpre;
  float* partials;  // [parts, N] or absent
  Dropout dropout;
  uint32_t place;
  int dtype, activation, M, N, part_rows;
};

__global__ void __launch_bounds__(THREADS) upstream(const __grid_constant__ Upstream u) {
  FASTTX_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);  // [ROWS, 8, GROUPS]
  const int group = threadIdx.x % GROUPS, row = threadIdx.x / GROUPS;
  const int n = (blockIdx.x * GROUPS + group) * 8, live = min(8, u.N - n);
  const int64_t begin = int64_t{blockIdx.y} * u.part_rows;
  const int end = static_cast<int>(min(begin + u.part_rows, int64_t{u.M}));
  const Key key = load_key(u.dropout);
  float total[8] = {};
  if (live > 0)
    for (int m = static_cast<int>(begin) + row; m < end; m += ROWS) {
      float d[8];
      load_panel(u.dout, u.dtype, m, n, live, d);
      if (u.dropout.threshold) {
        const uint32_t kept = keep_bits(u.dropout, key, n / 8, m, u.place);
#pragma unroll
        for (int i = 0; i < 8; i++) d[i] = kept >> i & 1 ? d[i] : 0.0f;
      }
      if (u.activation) {
        float value[8], slope[8];
        load_panel(u.pre, u.dtype, m, n, live, value);
        activate<true>(u.activation, value, slope);
#pragma unroll
        for (int i = 0; i < 8; i++) d[i] *= slope[i];
      }
      if (u.dpre.data) store_panel(u.dpre, u.dtype, m, n, live, d);
#pragma unroll
      for (int i = 0; i < 8; i++) total[i] += d[i];
    }
  if (!u.partials) return;
#pragma unroll
  for (int i = 0; i < 8; i++) scratch[(row * 8 + i) * GROUPS + group] = total[i];
  __syncthreads();
  // A column a thread.
  const int column = blockIdx.x * GROUPS * 8 + threadIdx.x;
  if (column >= u.N) return;
  float sum = 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    sum += scratch[(r * 8 + threadIdx.x % 8) * GROUPS + threadIdx.x / 8];
  store(u.partials + int64_t{blockIdx.y} * u.N + column, sum * u.dropout.scale);
}

int asked_columns = 0;

bool on_hopper() { return compute_capability() == 90; }

bool runs_along(const fasttx_tensor& t, int dim) {
  const int other = 1 - dim;
  return (t.strides[dim] == 1 || t.sizes[dim] <= 1) &&
         (t.sizes[other] <= 1 || (t.strides[other] > 0 && t.strides[other] % 8 == 0));
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

bool can_be_operand(const fasttx_tensor& t) { return aligned(t.data) && runs_along(t, 1); }

Operand operand(const fasttx_tensor& t, bool flip) {
  const int along = runs_along(t, 1) ? 1 : 0, inner = flip ? 0 : 1, other = 1 - along;
  const int64_t stride = t.sizes[other] <= 1 ? (t.sizes[along] + 7) / 8 * 8 : t.strides[other];
  return {t.data, t.sizes[1 - inner], stride, along != inner};
}
Operand operand(const Panel& t, int64_t rows, int64_t columns, bool flip) {
  return {t.data, flip ? columns : rows, t.row, flip};
}

Panel panel(const fasttx_tensor& t) {
  if (!t.data) return {};
  const int64_t row = t.strides[0], column = t.strides[1];
  return {t.data, row, column, column == 1 && row % 8 == 0 && aligned(t.data)};
}
Panel panel_of_vector(const fasttx_tensor& t) {
  if (!t.data) return {};
  return {t.data, 0, t.strides[0], t.strides[0] == 1 && aligned(t.data)};
}
Panel take_panel(Run& run, int64_t rows, int64_t columns) {
  const int64_t row = (columns + 7) / 8 * 8;
  return {run.take(rows * row / 2), row, 1, 1};
}

FASTTX_API void fasttx_cuda_gemm_columns(int columns) { asked_columns = columns; }

// Not measured yet. Tiles of 256 columns read less, those of 128 hide the epilogue: an activation
// or dropout outweighs the reading, plain numbers do not.
void choose_tile(Gemm& g) {
  g.columns = 128;
  if (!on_hopper()) {
    g.slots = 2;
    return;
  }
  const bool light = !g.e.activation && !g.e.backward && !g.e.dropout.threshold;
  if (asked_columns)
    g.columns = asked_columns;
  else if (light && count_tiles(g, 256) >= multiprocessors())
    g.columns = 256;
  g.slots = g.columns == 256 ? 8 : 4;
}

void gemm(Run& run, Gemm g) {
  if (!g.M || !g.N) return;
  if (!g.parts) g.parts = 1, g.part_steps = INT32_MAX;
  if (!g.columns) choose_tile(g);
  run.then([&] {
    return on_hopper() ? launch_gemm_sm90(g, run.stream) : launch_gemm_sm80(g, run.stream);
  });
}

void plain_product(Run& run, Gemm g, const Panel& out) {
  choose_tile(g);
  const int step = on_hopper() ? 64 : 32;
  const int64_t tiles = count_tiles(g, g.columns);
  const int steps = g.pairs * ((g.K + step - 1) / step);
  const int64_t most = int64_t{steps} * step / 512;
  // Where tiles are too few for the card, parts of at least 512 of k.
  const int64_t wanted = tiles ? multiprocessors() / tiles : 1;
  int parts = static_cast<int>(min(min(wanted, most), int64_t{MOST_PARTS}));
  if (g.K == 0) parts = 0;
  if (parts == 1 || (parts < 1 && g.K)) {
    g.e.out = out;
    gemm(run, g);
    return;
  }
  float* partials = nullptr;
  if (parts) {
    g.part_steps = (steps + parts - 1) / parts;
    g.parts = parts = (steps + g.part_steps - 1) / g.part_steps;
    partials = g.e.partials = run.take(int64_t{parts} * g.M * g.N);
    gemm(run, g);
  }
  sum_parts(run, g.dtype, out, g.M, g.N, partials, parts);
}

void weight_gradient(Run& run, int dtype, float scale, const Operand& left, const Operand& right,
                     int inner, const fasttx_tensor& out) {
  Panel to = panel(out);
  const bool turned = to.row == 1 && to.column != 1;  // write along memory
  if (turned) to = {to.data, to.column, 1, to.column % 8 == 0 && aligned(to.data)};
  Gemm g = {};
  g.dtype = dtype;
  g.a[0] = turned ? right : left;
  g.b[0] = turned ? left : right;
  g.M = static_cast<int>(g.a[0].outer);
  g.N = static_cast<int>(g.b[0].outer);
  g.K = inner;
  g.pairs = 1;
  g.e.scale = scale;
  plain_product(run, g, to);
}

void sum_parts(Run& run, int dtype, const Panel& out, int64_t rows, int64_t columns,
               const float* partials, int64_t parts) {
  if (!rows || !columns) return;
  run.then([&] {
    return add_parts({{{out.data, dtype, out.row, out.column}},
                      partials,
                      rows * columns,
                      0,
                      rows,
                      columns,
                      static_cast<int>(parts)},
                     run.stream);
  });
}

void upstream_gradient(Run& run, int dtype, const fasttx_tensor& dout, const fasttx_tensor& pre,
                       int activation, const Dropout& dropout, uint32_t place, const Panel& dpre,
                       const fasttx_tensor& sums) {
  Upstream u = {panel(dout), panel(pre), dpre, nullptr, dropout, place, dtype, activation};
  u.M = static_cast<int>(dout.sizes[0]);
  u.N = static_cast<int>(dout.sizes[1]);
  u.part_rows = max(1, (u.M + ROW_PARTS * ROWS - 1) / (ROW_PARTS * ROWS)) * ROWS;
  const int parts = (u.M + u.part_rows - 1) / u.part_rows;
  if (sums.data) u.partials = run.take(int64_t{parts} * u.N);
  if (parts && u.N)
    run.then([&] {
      const dim3 grid((u.N + GROUPS * 8 - 1) / (GROUPS * 8), parts);
      return launch(upstream, grid, THREADS, 8 * THREADS * sizeof(float), run.stream, u);
    });
  if (sums.data) sum_parts(run, dtype, panel_of_vector(sums), 1, u.N, u.partials, parts);
}

}  // namespace fasttx
