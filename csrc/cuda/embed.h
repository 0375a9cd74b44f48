// What the kernels of embed share: the arguments on the device, the rows of the tables that a row
// of the result is the sum of.
#pragma once
#include "cpu/embed.h"
#include "cuda/norm_row.h"

namespace fasttx {

struct Embed {
  fasttx_embed a;
  Dropout dropout;
  fasttx_rows dz;   // backward: the gradient of the sum of the tables' rows, [M, N]; or absent
  float* means;     // backward of any width: [2, M]: of dout * weight, and of dout * weight * xhat
  float* partials;  // backward: [parts, 3, N]: sums for dnorm_weight, dnorm_bias; or absent
  int64_t part_rows;
  int parts;
  RowGroup group;  // of rows in registers
};

inline Embed embed_arguments(const fasttx_embed& a) {
  Embed p = {a, make_dropout(a.dropout_p, a.seed), {}, nullptr, nullptr, 0, 0, row_group(a.N)};
  if (!a.norm) p.a.norm_weight = p.a.norm_bias = {};
  return p;
}

FASTTX_DEVICE int64_t id_of(const fasttx_embed& a, int table, int64_t m) {
  if (a.ids[table]) return load(a.ids[table] + m);
  return table == FASTTX_POSITION ? a.start + m % a.S : 0;
}

// Where the rows begin in their tables; false where an id is out of range.
struct Places {
  int64_t at[FASTTX_TABLES];
  bool inside;
};
FASTTX_DEVICE Places places(const fasttx_embed& a, int64_t m) {
  Places p = {{0, 0, 0}, true};
#pragma unroll
  for (int t = 0; t < FASTTX_TABLES; t++) {
    if (!a.table[t].data) continue;
    const int64_t id = id_of(a, t, m);
    p.inside &= id >= 0 && id < a.rows[t];
    p.at[t] = id * a.table[t].stride[2];
  }
  return p;
}

FASTTX_DEVICE Bits8 load_table(const fasttx_embed& a, int table, const Places& p, int64_t n) {
  return load8(a.table[table].data, a.table[table].dtype, p.at[table] + n);
}

// z of eight columns: scale * token + position + segment; NaN where an id is out of range.
FASTTX_DEVICE void sum_tables(const fasttx_embed& a, const Places& p, const Bits8& token,
                              const Bits8& position, int64_t n, float (&z)[8]) {
  float more[8];
  const float scale = p.inside ? static_cast<float>(a.scale) : NAN;
  if (p.inside) unpack8(token, a.table[FASTTX_TOKEN].dtype, z);
#pragma unroll
  for (int i = 0; i < 8; i++) z[i] = p.inside ? z[i] * scale : NAN;
  if (!p.inside) return;
  if (a.table[FASTTX_POSITION].data) {
    unpack8(position, a.table[FASTTX_POSITION].dtype, more);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] += more[i];
  }
  if (a.table[FASTTX_SEGMENT].data) {
    unpack8(load_table(a, FASTTX_SEGMENT, p, n), a.table[FASTTX_SEGMENT].dtype, more);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] += more[i];
  }
}

// The same of one column, of any strides.
FASTTX_DEVICE float sum_tables(const fasttx_embed& a, const Places& p, int64_t n) {
  if (!p.inside) return NAN;
  float z = 0.0f;
#pragma unroll
  for (int t = 0; t < FASTTX_TABLES; t++) {
    const fasttx_rows& table = a.table[t];
    if (!table.data) continue;
    const float x = load1(table.data, table.dtype, p.at[t] + n * table.column);
    z += t == FASTTX_TOKEN ? x * static_cast<float>(a.scale) : x;
  }
  return z;
}

}  // namespace fasttx
