// The feed-forward layer, forward: a block of tokens, the lanes of vectors, goes through both products;
// its hidden layer stays packed for the second one and never lies in memory as a matrix. For a few
// tokens the sums themselves lie in lanes.
#include "cpu/ffn.h"

#include "cpu/neighbours.h"
#include "cpu/parallel.h"
#include "cpu/strip.h"

namespace fasttx::FASTTX_ISA {
namespace {

enum DropoutPlace { HIDDEN = 0, OUTPUT = 1 };

struct Forward {
  const fasttx_ffn& a;
  Dropout hidden, output;
  int64_t M, K, F, N;
  int width;
  Broadcast w1, w2, w_gate;

  int32_t dtype() const { return a.x.dtype; }
  int64_t x_floats() const { return padded_units(dtype(), K) * width; }
  int64_t h_floats() const { return padded_units(dtype(), F) * width; }
  int64_t tokens(int64_t block) const { return min64(width, M - block * width); }
};

// A strip of the hidden layer, and of its gate: columns n ..., to h as packed lanes.
template <class T>
void hidden_strip(const Forward& p, int64_t block, float* s, float* gate, int64_t n, int64_t rows,
                  float* h) {
  const fasttx_ffn& a = p.a;
  const int64_t m = block * p.width, lanes = p.tokens(block);
  const int vecs = (int)((lanes + W - 1) / W);
  const bool pairs = units_of(p.dtype(), 2) == 1;
  add_bias<T>(s, rows, a.b1, n);
  if (a.keep) put_transposed<T>(s, rows, lanes, a.pre, {}, m, n);
  if (gate) {
    add_bias<T>(gate, rows, a.b_gate, n);
    if (a.keep) put_transposed<T>(gate, rows, lanes, a.pre_gate, {}, m, n);
  }
  apply_activation(a.activation, s, gate, rows, vecs);
  drop_strip(p.hidden, s, rows, vecs, m, n, HIDDEN);
  for (int64_t r = 0; r < rows; r += pairs ? 2 : 1)
    for (int v = 0; v < vecs; v++) {
      const vf one = load(s + r * LANES + v * W);
      if (pairs) {
        const vf two = r + 1 < rows ? load(s + (r + 1) * LANES + v * W) : vf{};
        store_int(h + (n + r) / 2 * p.width + v * W, round_pair(one, two));
      } else {
        store(h + (n + r) * p.width + v * W, one);
      }
    }
}

// Strips from .. to - 1 of the hidden layer of a block, of its lanes x.
template <class T>
void hidden_strips(const Forward& p, int64_t block, const float* x, float* h, int64_t from,
                   int64_t to) {
  const int64_t units = units_of(p.dtype(), p.K), step = rows_together(units);
  const int vecs = (int)((p.tokens(block) + W - 1) / W);
  const bool gated = p.a.w_gate.data;
  alignas(64) float c[BLOCK_ROWS * LANES], gate[BLOCK_ROWS * LANES];
  const int64_t end = min64(to * STRIP, p.F);
  for (int64_t n = from * STRIP; n < end; n += step) {
    const int64_t here = min64(step, end - n);
    product_rows(p.dtype(), c, p.w1, n, here, x, p.width, units, vecs, false);
    if (gated) product_rows(p.dtype(), gate, p.w_gate, n, here, x, p.width, units, vecs, false);
    for (int64_t r = 0; r < here; r += STRIP)
      hidden_strip<T>(p, block, c + r * LANES, gated ? gate + r * LANES : nullptr, n + r,
                      min64(STRIP, here - r), h);
  }
}

// Strips from .. to - 1 of the output of a block, of its hidden layer h.
template <class T>
void output_strips(const Forward& p, int64_t block, const float* h, int64_t from, int64_t to) {
  const fasttx_ffn& a = p.a;
  const int64_t m = block * p.width, lanes = p.tokens(block), units = units_of(p.dtype(), p.F);
  const int64_t step = rows_together(units), end = min64(to * STRIP, p.N);
  const int vecs = (int)((lanes + W - 1) / W);
  alignas(64) float c[BLOCK_ROWS * LANES];
  for (int64_t n = from * STRIP; n < end; n += step) {
    const int64_t here = min64(step, end - n);
    product_rows(p.dtype(), c, p.w2, n, here, h, p.width, units, vecs, false);
    for (int64_t r = 0; r < here; r += STRIP) {
      float* s = c + r * LANES;
      const int64_t rows = min64(STRIP, here - r);
      add_bias<T>(s, rows, a.b2, n + r);
      drop_strip(p.output, s, rows, vecs, m, n + r, OUTPUT);
      put_transposed<T>(s, rows, lanes, a.out, {}, m, n + r);
    }
  }
}

template <class T>
int forward(Forward p) {
  const fasttx_ffn& a = p.a;
  const Operand w1 = matrix(a.w1), w2 = matrix(a.w2), w_gate = matrix(a.w_gate), x = matrix(a.x);
  const int64_t one = broadcast_floats(w1, p.F, p.K), two = broadcast_floats(w2, p.N, p.F);
  const int64_t three = a.w_gate.data ? broadcast_floats(w_gate, p.F, p.K) : 0;
  float* packed = nullptr;
  if (one + two + three && !(packed = (float*)scratch(SCRATCH_SHARED, (one + two + three) * 4)))
    return FASTTX_NO_MEMORY;
  p.w1 = broadcast(w1, p.F, p.K, packed);
  p.w2 = broadcast(w2, p.N, p.F, packed + one);
  if (a.w_gate.data) p.w_gate = broadcast(w_gate, p.F, p.K, packed + one + two);
  p.width = block_lanes(a.x.dtype, max64(p.K, p.F));

  const int64_t blocks = (p.M + p.width - 1) / p.width, workers = num_workers();
  const int64_t hidden = (p.F + STRIP - 1) / STRIP, output = (p.N + STRIP - 1) / STRIP;
  bool failed = false;
  const auto pack = [&](int64_t block) {
    float* lanes = (float*)scratch(SCRATCH_PACK, p.x_floats() * 4 + 64);
    if (lanes) pack_lane_block(x, block * p.width, p.tokens(block), p.K, p.width, lanes);
    else __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    return lanes;
  };
  if (blocks >= workers) {
    parallel_items(blocks, workers, [&](int64_t, int64_t block) {
      const float* lanes = pack(block);
      float* h = (float*)scratch(SCRATCH_HEAD, p.h_floats() * 4 + 64);
      if (!h) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      if (!lanes || !h) return;
      hidden_strips<T>(p, block, lanes, h, 0, hidden);
      output_strips<T>(p, block, h, 0, output);
    });
    return failed ? FASTTX_NO_MEMORY : FASTTX_OK;
  }
  // Fewer blocks than workers: all of them, split by columns.
  float* h = (float*)scratch(SCRATCH_HEAD, blocks * p.h_floats() * 4 + 64);
  if (!h) return FASTTX_NO_MEMORY;
  const int64_t parts = (2 * workers + blocks - 1) / blocks;
  parallel_items(blocks * parts, workers, [&](int64_t, int64_t item) {
    const int64_t block = item / parts, part = item % parts;
    if (const float* lanes = pack(block))
      hidden_strips<T>(p, block, lanes, h + block * p.h_floats(), hidden * part / parts,
                       hidden * (part + 1) / parts);
  });
  parallel_items(blocks * parts, workers, [&](int64_t, int64_t item) {
    const int64_t block = item / parts, part = item % parts;
    output_strips<T>(p, block, h + block * p.h_floats(), output * part / parts,
                     output * (part + 1) / parts);
  });
  return failed ? FASTTX_NO_MEMORY : FASTTX_OK;
}

// Rows m ... and columns n ... of the hidden layer, s and its gate [rows][LANES], to h in H.
template <class T, class H>
void hidden_columns(const Forward& p, float* s, float* gate, int64_t m, int64_t rows, int64_t n,
                    int64_t count, H* h, int64_t h_row) {
  const fasttx_ffn& a = p.a;
  add_bias_columns<T>(s, rows, count, a.b1, n);
  if (a.keep) put_columns<T>(s, rows, count, matrix(a.pre), m, n);
  if (gate) {
    add_bias_columns<T>(gate, rows, count, a.b_gate, n);
    if (a.keep) put_columns<T>(gate, rows, count, matrix(a.pre_gate), m, n);
  }
  apply_activation(a.activation, s, gate, rows, LANES / W);
  drop_columns(p.hidden, s, rows, m, n, HIDDEN);
  put_columns<H>(s, rows, count, {h, 0, h_row, 1}, m, n);
}
template <class T>
void output_columns(const Forward& p, float* s, int64_t m, int64_t rows, int64_t n, int64_t count) {
  add_bias_columns<T>(s, rows, count, p.a.b2, n);
  drop_columns(p.output, s, rows, m, n, OUTPUT);
  put_columns<T>(s, rows, count, matrix(p.a.out), m, n);
}

template <class T, class H>
int few_forward(const Forward& p) {
  const fasttx_ffn& a = p.a;
  const int64_t M = p.M, x_floats = few_floats(p.dtype(), M, p.K), h_row = padded_units(p.dtype(), p.F);
  float* memory = (float*)scratch(SCRATCH_SHARED, (x_floats + M * h_row) * 4 + 64);
  if (!memory) return FASTTX_NO_MEMORY;
  const Broadcast x = pack_few(matrix(a.x), M, p.K, memory);
  const Broadcast h = {memory + x_floats, h_row};
  __builtin_memset(memory + x_floats, 0, M * h_row * 4);
  parallel_neighbours((p.F + LANES - 1) / LANES, num_workers(), [&](int64_t, int64_t item) {
    const int64_t n = item * LANES, count = min64(LANES, p.F - n);
    alignas(64) float s[FEW * LANES] = {}, gate[FEW * LANES] = {};
    few_rows(s, x, M, matrix(a.w1), n, count, p.K);
    if (a.w_gate.data) few_rows(gate, x, M, matrix(a.w_gate), n, count, p.K);
    hidden_columns<T, H>(p, s, a.w_gate.data ? gate : nullptr, 0, M, n, count, (H*)h.data,
                         h_row * 4 / sizeof(H));
  });
  parallel_neighbours((p.N + LANES - 1) / LANES, num_workers(), [&](int64_t, int64_t item) {
    const int64_t n = item * LANES, count = min64(LANES, p.N - n);
    alignas(64) float s[FEW * LANES] = {};
    few_rows(s, h, M, matrix(a.w2), n, count, p.F);
    output_columns<T>(p, s, 0, M, n, count);
  });
  return FASTTX_OK;
}

// Weights kept transposed, and too few tokens to pay for turning them: the lanes are columns.
template <class T>
struct Turned {
  const Forward& p;
  T* h;
  float* gate;

  int run() {
    const fasttx_ffn& a = p.a;
    const Operand x = matrix(a.x);
    const Term one = {x, matrix(a.w1), p.K}, other = {x, matrix(a.w_gate), p.K};
    const Term two = {{h, p.dtype(), p.F, 1}, matrix(a.w2), p.F};
    int status = FASTTX_OK;
    if (gate)
      status = multiply(
          &other, 1, p.M, p.F,
          [](void* t, float* s, int64_t m, int64_t rows, int64_t n, int64_t lanes) {
            Turned& self = *(Turned*)t;
            put_columns<float>(s, rows, lanes, {self.gate, 0, self.p.F, 1}, m, n);
          },
          this);
    if (status == FASTTX_OK)
      status = multiply(
          &one, 1, p.M, p.F,
          [](void* t, float* s, int64_t m, int64_t rows, int64_t n, int64_t lanes) {
            Turned& self = *(Turned*)t;
            alignas(64) float gate[STRIP * LANES];
            for (int64_t r = 0; self.gate && r < rows; r++)
              for (int64_t l = 0; l < lanes; l += W)
                store(gate + r * LANES + l,
                      load_strided(self.gate + (m + r) * self.p.F + n + l, 1, (int)min64(W, lanes - l)));
            hidden_columns<T, T>(self.p, s, self.gate ? gate : nullptr, m, rows, n, lanes, self.h,
                                 self.p.F);
          },
          this);
    if (status == FASTTX_OK)
      status = multiply(
          &two, 1, p.M, p.N,
          [](void* t, float* s, int64_t m, int64_t rows, int64_t n, int64_t lanes) {
            output_columns<T>(((Turned*)t)->p, s, m, rows, n, lanes);
          },
          this);
    return status;
  }
};
template <class T>
int turned_forward(const Forward& p) {
  const int64_t size = round_up(p.M * p.F, 64);
  float* memory = (float*)scratch(SCRATCH_HEAD, size * (4 + sizeof(T)) + 64);
  if (!memory) return FASTTX_NO_MEMORY;
  Turned<T> t = {p, (T*)(memory + size), p.a.w_gate.data ? memory : nullptr};
  return t.run();
}

bool turned(const fasttx_tensor& w) { return w.strides[0] == 1 && w.strides[1] != 1; }

}  // namespace

int ffn_fwd(const fasttx_ffn& a) {
  Forward p = {a, make_dropout(a.hidden_dropout_p, a.seed), make_dropout(a.dropout_p, a.seed),
               a.x.sizes[0], a.x.sizes[1], a.w1.sizes[0], a.w2.sizes[0], 0, {}, {}, {}};
  const bool rows = p.F >= FEWEST && p.N >= FEWEST && a.w1.strides[1] == 1 && a.w2.strides[1] == 1 &&
                    (!a.w_gate.data || a.w_gate.strides[1] == 1);
  int status = FASTTX_OK;
  if (p.M == 0) return status;
  with_type(a.x.dtype, [&](auto t) {
    typedef decltype(t) T;
    if (p.M <= FEW && rows)
      status = units_of(a.x.dtype, 2) == 1 ? few_forward<T, bf16>(p) : few_forward<T, float>(p);
    else if (p.M <= TURNED_FEW && turned(a.w1) && turned(a.w2))
      status = turned_forward<T>(p);
    else
      status = forward<T>(p);
  });
  return status;
}

}  // namespace fasttx::FASTTX_ISA
