// The epilogue of a product. A warp hands over its accumulators by strips of 16 rows x 64 columns
// in shared memory of its own, so that every lane then has eight neighbouring columns of a row. A
// strip is two pieces of 32 columns that lie half a tile apart; of a gated product the second piece
// is the gate's, of the same columns.
#pragma once
#include "cuda/tile/activation.h"
#include "cuda/tile/panel.h"

namespace fasttx {

constexpr int STRIP_ROWS = 16, STRIP_COLUMNS = 64, STRIP_BYTES = STRIP_ROWS * STRIP_COLUMNS * 4;
// Tiles of rows that go together, so that the cache holds what they read.
constexpr int GROUP_ROWS = 8;

struct Tile {
  int m, n;        // the first row and column
  int begin, end;  // steps of k
  int part;
};

template <int ROWS, int COLUMNS, int STEP>
FASTTX_DEVICE Tile tile_of(const Gemm& g, int64_t index) {
  const int width = g.gated ? COLUMNS / 2 : COLUMNS;
  const int tiles_m = (g.M + ROWS - 1) / ROWS, tiles_n = (g.N + width - 1) / width;
  const int64_t tiles = int64_t{tiles_m} * tiles_n;
  Tile t;
  t.part = static_cast<int>(index / tiles);
  index %= tiles;
  const int64_t band = int64_t{GROUP_ROWS} * tiles_n;
  const int first = static_cast<int>(index / band) * GROUP_ROWS;
  const int inside = static_cast<int>(index % band), rows = min(tiles_m - first, GROUP_ROWS);
  t.m = (first + inside % rows) * ROWS;
  t.n = inside / rows * width;
  t.begin = t.part * g.part_steps;
  t.end = min(t.begin + g.part_steps, g.pairs * ((g.K + STEP - 1) / STEP));
  return t;
}

// Rows are 64 words; eight rows put the same eight columns into different banks.
FASTTX_DEVICE float* strip_at(float* strip, int row, int column) {
  return strip + row * STRIP_COLUMNS + (column ^ (row & 7) * 8);
}

// value(f, i): number i of the lane's four in fragment f, 16 rows x 8 columns laid out as mma's d.
template <class Value>
FASTTX_DEVICE void fill_strip(float* strip, int lane, Value value) {
#pragma unroll
  for (int f = 0; f < 8; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float2* at = reinterpret_cast<float2*>(strip_at(strip, lane / 4 + 8 * half, 8 * f));
      at[lane % 4] = {value(f, 2 * half), value(f, 2 * half + 1)};
    }
}

FASTTX_DEVICE void read_strip(float* strip, int row, int group, float (&v)[8]) {
  // Half of the groups begin with their second four: 32 banks for eight lanes.
  const int first = group / 4;
  const Words* at = reinterpret_cast<const Words*>(strip_at(strip, row, 8 * group));
  const Words x = at[first], y = at[1 - first];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[i] = __uint_as_float(first ? y.w[i] : x.w[i]);
    v[4 + i] = __uint_as_float(first ? x.w[i] : y.w[i]);
  }
}

struct Sums {
  float dpre[8], dgate[8];
};

template <class T>
FASTTX_DEVICE void scale_and_bias(float scale, const Panel& bias, int n, int live, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= scale;
  if (!bias.data) return;
  float more[8];
  load_panel(bias, dtype_of<T>, 0, n, live, more);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] += more[i];
}

template <class T>
FASTTX_DEVICE void finish_forward(const Gemm& g, Key key, int m, int n, int live, float (&v)[8],
                                  float (&gate)[8]) {
  const Epilogue& e = g.e;
  float other[8];
  scale_and_bias<T>(e.scale, e.bias, n, live, v);
  if (e.pre.data) store_panel(e.pre, dtype_of<T>, m, n, live, v);
  activate<false>(e.activation, v, other);
  if (g.gated) {
    scale_and_bias<T>(e.scale, e.gate_bias, n, live, gate);
    if (e.pre_gate.data) store_panel(e.pre_gate, dtype_of<T>, m, n, live, gate);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= gate[i];
  }
  if (e.dropout.threshold) {
    const uint32_t kept = keep_bits(e.dropout, key, n / 8, m, e.place);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = kept >> i & 1 ? v[i] * e.dropout.scale : 0.0f;
  }
  if (e.residual.data) {
    load_panel(e.residual, dtype_of<T>, m, n, live, other);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += other[i];
  }
  if (e.out.data) store_panel(e.out, dtype_of<T>, m, n, live, v);
}

template <class T>
FASTTX_DEVICE void finish_backward(const Gemm& g, Key key, int m, int n, int live, float (&v)[8],
                                   Sums& sums) {
  const Epilogue& e = g.e;
  const uint32_t kept =
      e.dropout.threshold ? keep_bits(e.dropout, key, n / 8, m, e.place) : 0xffu;
  const float scale = e.dropout.threshold ? e.dropout.scale : 1.0f;
  float value[8], slope[8], gate[8];
  load_panel(e.pre, dtype_of<T>, m, n, live, value);
  activate<true>(e.activation, value, slope);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = kept >> i & 1 ? v[i] * e.scale * scale : 0.0f;
  if (e.pre_gate.data) {
    load_panel(e.pre_gate, dtype_of<T>, m, n, live, gate);
    float beside[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      beside[i] = v[i] * value[i];
      sums.dgate[i] += beside[i];
      slope[i] *= gate[i];
      value[i] *= gate[i];
    }
    if (e.dgate.data) store_panel(e.dgate, dtype_of<T>, m, n, live, beside);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    v[i] *= slope[i];
    sums.dpre[i] += v[i];
    value[i] = kept >> i & 1 ? value[i] * scale : 0.0f;
  }
  if (e.dpre.data) store_panel(e.dpre, dtype_of<T>, m, n, live, v);
  if (e.h.data) store_panel(e.h, dtype_of<T>, m, n, live, value);
}

FASTTX_DEVICE void store_part(const Gemm& g, int part, int m, int n, int live, float (&v)[8]) {
  const int64_t at = (int64_t{part} * g.M + m) * g.N + n;
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= g.e.scale;
  if (live == 8 && g.N % 4 == 0) {
    store8(g.e.partials, FASTTX_F32, at, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < live) store(g.e.partials + at + i, v[i]);
}

// The rows from m on; the pieces' first columns are n and n + apart.
template <class T>
FASTTX_DEVICE void finish_strip(const Gemm& g, Key key, float* strip, int lane, int part, int m,
                               int n, int apart, Sums& sums) {
  const int groups = g.gated ? 4 : 8, group = lane % groups;
  n += group / 4 * apart + group % 4 * 8;
  const int live = min(8, g.N - n);
  if (live <= 0) return;
#pragma unroll 1
  for (int row = lane / groups; row < STRIP_ROWS && m + row < g.M; row += 32 / groups) {
    float v[8], gate[8];
    read_strip(strip, row, group, v);
    if (g.gated) read_strip(strip, row, group + 4, gate);
    if (g.e.partials)
      store_part(g, part, m + row, n, live, v);
    else if (g.e.backward)
      finish_backward<T>(g, key, m + row, n, live, v, sums);
    else
      finish_forward<T>(g, key, m + row, n, live, v, gate);
  }
}

// Of all rows that the warp has seen of these columns; the lanes of a group are 8 apart.
FASTTX_DEVICE void store_sums(const Gemm& g, int slot, int lane, int n, int apart, Sums& sums) {
  const int group = lane % 8;
  n += group / 4 * apart + group % 4 * 8;
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int with = 8; with < 32; with *= 2) {
      sums.dpre[i] += __shfl_xor_sync(~0u, sums.dpre[i], with);
      sums.dgate[i] += __shfl_xor_sync(~0u, sums.dgate[i], with);
    }
  if (lane >= 8) return;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (n + i >= g.N) break;
    const int64_t at = int64_t{slot} * g.N + n + i;
    if (g.e.dpre_sums) store(g.e.dpre_sums + at, sums.dpre[i]);
    if (g.e.dgate_sums) store(g.e.dgate_sums + at, sums.dgate[i]);
  }
}

}  // namespace fasttx
