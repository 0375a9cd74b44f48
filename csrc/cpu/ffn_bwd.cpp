// The feed-forward layer, backward: by chunks of tokens, whose dpre, dgate and h lie in scratch memory.
// The first product's epilogue makes all three.
#include "cpu/ffn.h"

#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/strip.h"

namespace fasttx::FASTTX_ISA {

int linear_fwd(const fasttx_linear&);

namespace {

enum DropoutPlace { HIDDEN = 0, OUTPUT = 1 };

template <class T>
struct Chunk {
  const fasttx_ffn& a;
  Dropout hidden, output;
  int64_t first, F;
  Operand pre, gate;  // rows of the chunk; gate.data == NULL without one
  T *dpre, *dgate, *h;
};

// s = dh of rows m and columns f.
template <class T>
void hidden_gradients(void* context, float* s, int64_t m, int64_t rows, int64_t f, int64_t lanes) {
  const Chunk<T>& p = *(const Chunk<T>*)context;
  const vf scale = set1(p.hidden.keep_scale);
  uint16_t numbers[LANES > 8 * W ? LANES : 8 * W];
  with_activation(p.a.activation, [&](auto tag) {
    for (int64_t r = 0; r < rows; r++) {
      if (p.hidden.threshold)
        philox_row(p.hidden, lanes, (uint32_t)(p.first + m + r), HIDDEN, 0, numbers, (uint32_t)(f / 8));
      // The next strip's lines, which lie a row apart.
      for (int64_t c = 0; c < LANES; c += 64 / (int64_t)sizeof(T)) {
        const int64_t next = (m + r + STRIP) * p.F + f + c;
        __builtin_prefetch(element<const T>(p.pre, m + r + STRIP, f + c));
        __builtin_prefetch(p.dpre + next, 1);
        if (p.h) __builtin_prefetch(p.h + next, 1);
        if (p.gate.data) {
          __builtin_prefetch(element<const T>(p.gate, m + r + STRIP, f + c));
          __builtin_prefetch(p.dgate + next, 1);
        }
      }
      for (int64_t l = 0; l < lanes; l += W) {
        const int here = (int)min64(W, lanes - l);
        const int64_t at = (m + r) * p.F + f + l;
        vf dh = load(s + r * LANES + l), h, slope;
        activate<decltype(tag)::value>(
            load_strided(element<const T>(p.pre, m + r, f + l), p.pre.column, here), &h, &slope);
        if (p.hidden.threshold) {
          const vmask keep = keep_columns(numbers + l, p.hidden.threshold);
          dh = zero_unless(keep, dh * scale);
          if (p.gate.data) store_strided(p.dgate + at, 1, dh * h, here);
          h = zero_unless(keep, h * scale);
        } else if (p.gate.data) {
          store_strided(p.dgate + at, 1, dh * h, here);
        }
        vf dpre = dh * slope;
        if (p.gate.data) {
          const vf gate = load_strided(element<const T>(p.gate, m + r, f + l), p.gate.column, here);
          dpre *= gate;
          h *= gate;
        }
        store_strided(p.dpre + at, 1, dpre, here);
        if (p.h) store_strided(p.h + at, 1, h, here);
      }
    }
  });
}

// g = dout with its dropout, rounded to T.
template <class T>
void drop_rows(const Dropout& d, Operand dout, int64_t first, int64_t M, int64_t N, T* g) {
  parallel_items(M, num_workers(), [&](int64_t, int64_t m) {
    uint16_t numbers[LANES > 8 * W ? LANES : 8 * W];
    for (int64_t n = 0; n < N; n += LANES) {
      philox_row(d, LANES, (uint32_t)(first + m), OUTPUT, 0, numbers, (uint32_t)(n / 8));
      for (int64_t c = n; c < min64(N, n + LANES); c += W) {
        const int here = (int)min64(W, N - c);
        const vf x = load_strided(element<const T>(dout, m, c), dout.column, here);
        store_strided(g + m * N + c, 1,
                      zero_unless(keep_columns(numbers + (c - n), d.threshold), x * set1(d.keep_scale)), here);
      }
    }
  });
}

// The factors of the hidden layer again.
int recompute(const fasttx_ffn& a, const fasttx_tensor& w, const fasttx_tensor& bias, int64_t first,
              int64_t M, Operand out) {
  fasttx_linear l = {};
  l.x = a.x;
  l.x.data = (void*)from_row(matrix(a.x), first).data;
  l.x.sizes[0] = M;
  l.weight = w;
  l.bias = bias;
  l.out = {(void*)out.data, out.dtype, {M, w.sizes[0], 1, 1}, {out.row, out.column, 0, 0}};
  return linear_fwd(l);
}

struct Sums {
  float* next;
  float* take(int64_t n) {
    float* p = next;
    next += n;
    return p;
  }
};

template <class T>
int backward(const fasttx_ffn& a) {
  const int64_t M = a.x.sizes[0], K = a.x.sizes[1], F = a.w1.sizes[0], N = a.w2.sizes[0];
  const int32_t dtype = a.x.dtype;
  const bool gated = a.w_gate.data, again = !a.pre.data;
  Chunk<T> p = {a, make_dropout(a.hidden_dropout_p, a.seed), make_dropout(a.dropout_p, a.seed),
                0, F, {}, {}, nullptr, nullptr, nullptr};
  const int64_t chunk = min64(max64(1, M), chunk_rows(max64(F, max64(N, K))));
  const int64_t matrices = 2 + gated + again * (1 + gated), aligned = round_up(chunk * F, 64);
  T* memory = (T*)scratch(SCRATCH_HEAD, (matrices * aligned + chunk * N) * sizeof(T) + 64);
  if (!memory) return FASTTX_NO_MEMORY;
  p.dpre = memory;
  p.h = a.need & 8 ? memory + aligned : nullptr;
  p.dgate = memory + 2 * aligned;
  T* spare = memory + (2 + gated) * aligned;
  T* dropped = memory + matrices * aligned;

  Gradient dw1 = gradient(a.dw1), dw2 = gradient(a.dw2), dw_gate = gradient(a.dw_gate);
  float *db1 = nullptr, *db2 = nullptr, *db_gate = nullptr;
  if (M > chunk) {
    const int64_t one = a.need & 2 ? dw1.floats() : 0, two = a.need & 8 ? dw2.floats() : 0;
    const int64_t three = a.need & 32 ? dw_gate.floats() : 0;
    Sums sums = {(float*)scratch(SCRATCH_TILE, (one + two + three + 2 * F + N) * 4)};
    if (!sums.next) return FASTTX_NO_MEMORY;
    if (one) dw1.sum = sums.take(one);
    if (two) dw2.sum = sums.take(two);
    if (three) dw_gate.sum = sums.take(three);
    db1 = sums.take(F);
    db_gate = sums.take(F);
    db2 = sums.take(N);
  }

  int status = FASTTX_OK;
  const auto run = [&](bool wanted, const auto& f) {
    if (wanted && status == FASTTX_OK) status = f();
  };
  for (int64_t m = 0; (m < M || m == 0) && status == FASTTX_OK; m += chunk) {
    const int64_t n = min64(chunk, M - m);
    const bool first = m == 0, last = m + chunk >= M;
    const auto bias = [&](const Operand& rows, int64_t count, const fasttx_tensor& out, float* sum) {
      return add_rows(rows, n, count, {out.data, out.dtype, 0, out.strides[0], sum, first, last});
    };
    p.first = m;
    Operand g = from_row(matrix(a.dout), m);
    if (p.output.threshold) {
      drop_rows<T>(p.output, g, m, n, N, dropped);
      g = {dropped, dtype, N, 1};
    }
    run(a.need & 16, [&] { return bias(g, N, a.db2, db2); });
    if (!(a.need & ~16)) continue;
    if (again) {
      p.pre = {spare, dtype, F, 1};
      p.gate = {gated ? spare + aligned : nullptr, dtype, F, 1};
      run(true, [&] { return recompute(a, a.w1, a.b1, m, n, p.pre); });
      run(gated, [&] { return recompute(a, a.w_gate, a.b_gate, m, n, p.gate); });
    } else {
      p.pre = from_row(matrix(a.pre), m);
      if (gated) p.gate = from_row(matrix(a.pre_gate), m);
    }
    const Operand x = from_row(matrix(a.x), m);
    const Operand dpre = {p.dpre, dtype, F, 1}, dgate = {p.dgate, dtype, F, 1}, h = {p.h, dtype, F, 1};
    run(true, [&] {
      const Term term = {g, transposed(matrix(a.w2)), N};
      return multiply(&term, 1, n, F, hidden_gradients<T>, &p);
    });
    run(a.need & 8, [&] { return dw2.add(g, h, n, first, last); });
    run(a.need & 2, [&] { return dw1.add(dpre, x, n, first, last); });
    run(a.need & 32, [&] { return dw_gate.add(dgate, x, n, first, last); });
    run(a.need & 4, [&] { return bias(dpre, F, a.db1, db1); });
    run(a.need & 64, [&] { return bias(dgate, F, a.db_gate, db_gate); });
    run(a.need & 1, [&] {
      const Term terms[2] = {{dpre, transposed(matrix(a.w1)), F}, {dgate, transposed(matrix(a.w_gate)), F}};
      const Operand dx = from_row(matrix(a.dx), m);
      return multiply_into(terms, 1 + gated, n, K,
                           {(void*)dx.data, dtype, dx.row, dx.column, nullptr, true, true});
    });
  }
  return status;
}

}  // namespace

int ffn_bwd(const fasttx_ffn& a) {
  int status = FASTTX_OK;
  with_type(a.x.dtype, [&](auto t) { status = backward<decltype(t)>(a); });
  return status;
}

}  // namespace fasttx::FASTTX_ISA
