// c [M, N] = scale a [M, K] b [K, N] of 16-bit numbers, summed in fp32, and what follows it: what
// linear and ffn ask of the kernels in sm80/ and sm90/.
#pragma once
#include "cuda/philox.h"
#include "fasttx.h"

namespace fasttx {

// A matrix [outer, inner], summed over inner. Its memory runs along inner or, transposed, along
// outer; the other dimension's stride is in elements, a multiple of 8; data is aligned to 16 bytes.
struct Operand {
  const void* data;
  int64_t outer, stride;
  int transposed;
};

// A tensor [M, N] of 16-bit numbers that the epilogue reads or writes; data == nullptr: absent.
struct Panel {
  void* data;
  int64_t row, column;  // strides
  int by_eight;         // rows lie in whole aligned 16 bytes
};

// Forward: pre = c + bias, pre_gate = c' + gate_bias and
// out = dropout(act(pre) [pre_gate]) + residual. Backward, with dh = dropout(c):
// dpre = dh act'(pre) [pre_gate], dgate = dh act(pre), h = dropout(act(pre) [pre_gate]).
struct Epilogue {
  int backward, activation;
  float scale;
  uint32_t place;  // the head of dropout's counter
  Dropout dropout;
  Panel bias, gate_bias;  // one row each
  Panel pre, pre_gate;    // forward: written; backward: read
  Panel out, residual;
  Panel dpre, dgate, h;
  float *dpre_sums, *dgate_sums;  // [slots, N]: over the rows of a slot
  float* partials;                // [parts, M, N]: instead of all this, scale c's parts
};

struct Gemm {
  int dtype;
  int M, N, K;
  Operand a[2], b[2];
  int gated;  // c' = a[0] b[1], beside c = a[0] b[0]
  int pairs;  // 2: c = a[0] b[0] + a[1] b[1]
  int parts, part_steps;  // the sum over k, cut into parts of so many steps
  int columns, slots;     // of a tile: its columns, and the slots that its rows give
  Epilogue e;
};

inline int64_t count_tiles(const Gemm& g, int columns) {
  const int width = g.gated ? columns / 2 : columns;
  return int64_t{(g.M + 127) / 128} * ((g.N + width - 1) / width);
}

// What a call of an op has of memory and stream; or, counting, it launches nothing and finds how
// many floats it would take.
struct Run {
  float* space;
  void* stream;
  bool counting = false;
  int64_t used = 0;
  int status = 0;
  // Aligned to 16 bytes.
  float* take(int64_t floats) {
    float* at = counting ? nullptr : space + used;
    used += (floats + 3) / 4 * 4;
    return at;
  }
  template <class Launch>
  void then(Launch launch) {
    if (!counting && !status) status = launch();
  }
};

// An op's direction, which asks for its memory as it goes: the floats it takes, and a run; the
// latter a cudaError_t.
template <class Arguments>
int64_t count_floats(void (*direction)(Run&, const Arguments&), const Arguments& a) {
  Run run = {nullptr, nullptr, true};
  direction(run, a);
  return run.used;
}
template <class Arguments>
int run_on(void (*direction)(Run&, const Arguments&), const Arguments& a, float* workspace,
           void* stream) {
  Run run = {workspace, stream};
  direction(run, a);
  return run.status;
}

// A cudaError_t. A step is 32 and 64 of k.
int launch_gemm_sm80(const Gemm& g, void* stream);
int launch_gemm_sm90(const Gemm& g, void* stream);

// Sets the tile for this card, when all but what depends on it is there.
void choose_tile(Gemm& g);
// The product with its epilogue, on the kernels of this card.
void gemm(Run& run, Gemm g);
// Tiles of so many columns from now on (128 or 256), 0: chosen; to test and measure them.
FASTTX_API void fasttx_cuda_gemm_columns(int columns);
// out = scale * the sum of a b over the pairs; the epilogue is scale alone.
void plain_product(Run& run, Gemm g, const Panel& out);
// out [rows of left, rows of right] = scale left right^T, both summed over `inner`; out of any
// strides.
void weight_gradient(Run& run, int dtype, float scale, const Operand& left, const Operand& right,
                     int inner, const fasttx_tensor& out);

// dpre = dout act'(pre), or dout where dropout keeps it (not scaled), and sums [N] of it (scaled)
// over its rows; either may be absent.
void upstream_gradient(Run& run, int dtype, const fasttx_tensor& dout, const fasttx_tensor& pre,
                       int activation, const Dropout& dropout, uint32_t place, const Panel& dpre,
                       const fasttx_tensor& sums);
// out [rows, columns] = partials [parts, rows, columns], summed in order.
void sum_parts(Run& run, int dtype, const Panel& out, int64_t rows, int64_t columns,
               const float* partials, int64_t parts);

// Of a tensor [R, C]: rows outer, or columns where flipped.
bool can_be_operand(const fasttx_tensor& t);
Operand operand(const fasttx_tensor& t, bool flip);
Operand operand(const Panel& t, int64_t rows, int64_t columns, bool flip);
Panel panel(const fasttx_tensor& t);
Panel panel_of_vector(const fasttx_tensor& t);
// 16-bit [rows, columns] in the workspace, fit for an operand.
Panel take_panel(Run& run, int64_t rows, int64_t columns);

}  // namespace fasttx
