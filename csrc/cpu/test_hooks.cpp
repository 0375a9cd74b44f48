// The vector layer as the tests see it.
#include "cpu/philox.h"
#include "cpu/vec.h"
#include "fasttx.h"

namespace fasttx::FASTTX_ISA {

void test_exp2(const float* x, float* y, int64_t n, int degree) {
  for (int64_t i = 0; i < n; i += W) {
    const int rest = (int)min64(W, n - i);
    const vf t = load_partial(x + i, rest);
    store_partial(y + i, degree == 3 ? exp2<3>(t) : exp2<6>(t), rest);
  }
}

void test_tanh(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int rest = (int)min64(W, n - i);
    store_partial(y + i, tanh(load_partial(x + i, rest)), rest);
  }
}

void test_philox(uint32_t* words, int64_t n, uint64_t seed, uint32_t column_group, uint32_t row,
                 uint32_t head, uint32_t batch) {
  const Dropout d = make_dropout(0.5, &seed);
  for (int64_t i = 0; i < n; i += W) {
    vu out[4];
    philox(d, column_group, (vu)(lane_index() + (int)(row + i)), head, batch, out);
    for (int r = 0; r < W && i + r < n; r++)
      for (int w = 0; w < 4; w++) words[(i + r) * 4 + w] = out[w][r];
  }
}

template <class E>
static void round_all(const float* x, float* y, int64_t n) {
  E buffer[W];
  for (int64_t i = 0; i < n; i += W) {
    const int rest = (int)min64(W, n - i);
    store_partial(buffer, load_partial(x + i, rest), rest);
    if (rest == W) store(buffer, load(x + i));
    store_partial(y + i, load_partial(buffer, rest), rest);
  }
}

void test_round(const float* x, float* y, int64_t n, int to) {
  to == FASTTX_BF16 ? round_all<bf16>(x, y, n) : round_all<f16>(x, y, n);
}

}  // namespace fasttx::FASTTX_ISA
