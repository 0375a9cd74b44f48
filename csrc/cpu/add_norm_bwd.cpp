// Gradients of out = norm(z), z = residual + dropout(x + x_bias), z computed again from the inputs.
//
// dz = rstd * (g w - mean(g w) - xhat mean(g w xhat)) + dtotal, without the first mean for rms.
// The rows are cut into parts, a function of the shape alone; each part sums its parameter
// gradients over groups of GROUP rows, then over groups, and the parts are added in order.
#include <string.h>

#include "cpu/add_norm_row.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int BLOCK = 4;    // rows whose parameter gradients are added together
constexpr int GROUP = 64;   // rows summed before the part's own sums are touched
constexpr int64_t MAX_PARTS = 64, MAX_PART_FLOATS = 1 << 22;
enum { DX = 1, DRESIDUAL = 2, DWEIGHT = 4, DBIAS = 8, DX_BIAS = 16 };

// Sums kept by one part: weight, bias, x_bias gradients, those that are needed.
struct Sums {
  float *weight, *bias, *x_bias;
};

struct Backward : Problem {
  bool rms;
  int need, kinds;
  int64_t parts, part_rows;
  float* partials;  // [parts][kinds][padded]

  Sums sums(float* memory) const {
    Sums s = {};
    if (need & DWEIGHT) s.weight = memory, memory += padded;
    if (need & DBIAS) s.bias = memory, memory += padded;
    if (need & DX_BIAS) s.x_bias = memory;
    return s;
  }
};

// Rows of one block: z turned into xhat, the upstream gradient, and dx.
struct Block {
  float *xhat, *g, *d, *group;
  uint16_t* numbers;
};

void gradient_row(const Backward& p, int64_t m, float* xhat, float* g, float* d, uint16_t* numbers) {
  const fasttx_add_norm& a = *p.a;
  const int64_t N = p.N;
  sum_row(p, m, xhat, numbers);
  const vf mean = set1(p.rms ? 0.0f : a.mean[m]), rstd = set1(a.rstd[m]);
  for (int64_t n = 0; n < p.N; n += W) store(xhat + n, (load(xhat + n) - mean) * rstd);
  if (!a.dout.data) memset(g, 0, p.padded * sizeof(float));
  else read_row<false>(a.dout, m, N, g);
  if (!(p.need & (DX | DRESIDUAL | DX_BIAS))) return;
  // d holds g w first: rounded once, so that g w and its mean cancel where they are equal.
  vf along[2] = {}, across[2] = {};
  auto add = [&](int64_t n, int i) {
    const vf gw = load(g + n) * load(p.p.weight + n);
    store(d + n, gw);
    along[i] += gw;
    across[i] = fma(gw, load(xhat + n), across[i]);
  };
  int64_t n = 0;
  for (; n + 2 * W <= N; n += 2 * W) add(n, 0), add(n + W, 1);
  for (; n < N; n += W) add(n, 0);
  const vf c1 = set1(p.rms ? 0.0f : sum_lanes(along[0] + along[1]) / (float)N);
  const vf c2 = set1(sum_lanes(across[0] + across[1]) / (float)N);
  for (n = 0; n < N; n += W) store(d + n, (load(d + n) - fma(load(xhat + n), c2, c1)) * rstd);
  if (a.dtotal.data) read_row<true>(a.dtotal, m, N, d);
  if (p.need & DRESIDUAL) write_row(a.dresidual, m, N, d);
  if (p.dropout.threshold) drop_row(p.dropout, numbers, N, d);
  if (p.need & DX) write_row(a.dx, m, N, d);
}

FASTTX_INLINE void add_block(const Backward& p, const Block& b, const Sums& s, int rows) {
  for (int64_t n = 0; n < p.N; n += W) {
    vf weight = {}, bias = {}, x_bias = {};
    for (int i = 0; i < rows; i++) {
      const vf g = load(b.g + i * p.padded + n);
      weight = fma(g, load(b.xhat + i * p.padded + n), weight);
      bias += g;
      if (s.x_bias) x_bias += load(b.d + i * p.padded + n);
    }
    if (s.weight) store(s.weight + n, load(s.weight + n) + weight);
    if (s.bias) store(s.bias + n, load(s.bias + n) + bias);
    if (s.x_bias) store(s.x_bias + n, load(s.x_bias + n) + x_bias);
  }
}

void part(const Backward& p, int64_t index, const Block& b) {
  const int64_t floats = p.kinds * p.padded, begin = index * p.part_rows;
  const int64_t end = min64(p.M, begin + p.part_rows);
  float* total = p.partials + index * floats;
  memset(total, 0, floats * sizeof(float));
  const Sums group = p.sums(b.group);
  for (int64_t first = begin; first < end; first += GROUP) {
    memset(b.group, 0, floats * sizeof(float));
    const int64_t last = min64(end, first + GROUP);
    for (int64_t m = first; m < last; m += BLOCK) {
      const int rows = (int)min64(BLOCK, last - m);
      for (int i = 0; i < rows; i++)
        gradient_row(p, m + i, b.xhat + i * p.padded, b.g + i * p.padded, b.d + i * p.padded, b.numbers);
      if (!p.kinds) continue;
      if (rows == BLOCK) add_block(p, b, group, BLOCK);
      else add_block(p, b, group, rows);
    }
    for (int64_t n = 0; n < floats; n += W) store(total + n, load(total + n) + load(b.group + n));
  }
}

void finish(const Backward& p) {
  const fasttx_add_norm& a = *p.a;
  const int64_t floats = p.kinds * p.padded;
  float* total = p.partials;
  for (int64_t i = 1; i < p.parts; i++)
    for (int64_t n = 0; n < floats; n += W)
      store(total + n, load(total + n) + load(total + i * floats + n));
  const Sums s = p.sums(total);
  if (s.weight) write_row(a.dweight, 0, p.N, s.weight);
  if (s.bias) write_row(a.dbias, 0, p.N, s.bias);
  if (s.x_bias) write_row(a.dx_bias, 0, p.N, s.x_bias);
}

}  // namespace

int add_norm_bwd(const fasttx_add_norm& a) {
  Backward p = {};
  if (a.N == 0) return FASTTX_OK;
  if (!make_problem(a, &p)) return FASTTX_NO_MEMORY;
  p.rms = a.rms;
  p.need = a.need;
  p.kinds = !!(a.need & DWEIGHT) + !!(a.need & DBIAS) + !!(a.need & DX_BIAS);
  const int64_t floats = p.kinds * p.padded;
  const int64_t most = max64(1, min64(MAX_PARTS, MAX_PART_FLOATS / max64(1, floats)));
  p.part_rows = max64(1, (p.M + most - 1) / most);
  p.part_rows = round_up(p.part_rows, p.M > GROUP ? GROUP : BLOCK);
  p.parts = max64(1, (p.M + p.part_rows - 1) / p.part_rows);
  p.partials = (float*)scratch(SCRATCH_PACK, p.parts * floats * sizeof(float) + 64);
  if (!p.partials) return FASTTX_NO_MEMORY;
  int status = FASTTX_OK;
  parallel_items(p.parts, num_workers(), [&](int64_t, int64_t index) {
    const size_t block = BLOCK * p.padded;
    float* memory =
        (float*)scratch(SCRATCH_TILE, (3 * block + floats) * sizeof(float) + p.padded * sizeof(uint16_t));
    if (!memory) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    float* group = memory + 3 * block;
    part(p, index, {memory, memory + block, memory + 2 * block, group, (uint16_t*)(group + floats)});
  });
  if (status == FASTTX_OK) finish(p);
  return status;
}

}  // namespace fasttx::FASTTX_ISA
