// Matrix products with work of the caller's on the results while they are in the first cache: what
// linear and ffn share. c[i][j] = sum over k of a[i][k] b[j][k]; rows of a are broadcast, rows of b
// are the lanes of vectors. fp32 and fp16 are multiplied as fp32, bf16 in pairs where the CPU can.
#pragma once
#include "cpu/product.h"
#include "fasttx.h"

namespace fasttx::FASTTX_ISA {

// Element (i, k) at data + i * row + k * column elements.
struct Operand {
  const void* data;
  int32_t dtype;
  int64_t row, column;
};
namespace {
template <class T>
FASTTX_INLINE T* element(const Operand& m, int64_t i, int64_t k) {
  return (T*)m.data + i * m.row + k * m.column;
}
template <class F>
FASTTX_INLINE void with_type(int32_t dtype, const F& f) {
  switch (dtype) {
    case FASTTX_F32:
      return f(float());
    case FASTTX_BF16:
      return f(bf16());
    default:
      return f(f16());
  }
}
}  // namespace

// Lanes of a block: results come in strips [STRIP][LANES] of fp32.
constexpr int LANES = 64;

// 32-bit units that hold K elements, and the same rounded up to whole vectors.
int64_t units_of(int32_t dtype, int64_t K);
int64_t padded_units(int32_t dtype, int64_t K);

// Lanes of a block that the second level cache holds, of a sum over K elements: LANES or half.
int block_lanes(int32_t dtype, int64_t K);
// Rows j .. j + lanes - 1 of b as [padded_units][width].
void pack_lane_block(const Operand& b, int64_t j, int64_t lanes, int64_t K, int width, float* out);

// Rows to broadcast: unit p of row i is data[i * row + p].
struct Broadcast {
  const float* data;
  int64_t row;
};
// Floats of memory that `broadcast` needs for I rows; 0 where they can be read in place.
int64_t broadcast_floats(const Operand& a, int64_t I, int64_t K);
Broadcast broadcast(const Operand& a, int64_t I, int64_t K, float* memory);

// A sum of more units than CHUNK is done a chunk at a time for BLOCK_ROWS rows, so that the lanes of
// a chunk stay in the second level cache. Of fp32 no more than CHAIN units are added up in one
// accumulator: the roundings of 768 came out at twice the error of libraries that sum in parts.
constexpr int64_t CHUNK = 768, CHAIN = 192, BLOCK_ROWS = W == 8 ? 240 : 256;
// How many rows to give product_rows at a time.
int64_t rows_together(int64_t units);
// c [rows][LANES] = rows i ... of a x a block of lanes of `width`, its first `vecs` vectors; added to
// c where `add`.
void product_rows(int32_t dtype, float* c, const Broadcast& a, int64_t i, int64_t rows,
                  const float* lanes, int width, int64_t units, int vecs, bool add);

// What becomes of a strip s [rows][LANES], the results of rows i ... and lanes j ... .
typedef void (*Epilogue)(void* context, float* s, int64_t i, int64_t rows, int64_t j, int64_t lanes);

// c = sum of the terms, each a sum over its K; a strip at a time to the epilogue.
struct Term {
  Operand a, b;
  int64_t K;
};
int multiply(const Term* terms, int count, int64_t I, int64_t J, Epilogue epilogue, void* context);
// The same of few rows of a, and of b whose rows lie side by side (b.row == 1).
constexpr int64_t FEW_STRETCHES = 3;
int multiply_stretches(const Term& term, int64_t I, int64_t J, Epilogue epilogue, void* context);

// The same of few rows of a, and of b whose columns lie side by side and which has FEWEST rows at least.
int multiply_few(const Term& term, int64_t I, int64_t J, Epilogue epilogue, void* context);

// Where a sum over chunks of rows goes: the first chunk starts it, the last one rounds it to `out`.
// sum: fp32 [I][J] between the two; unused where one chunk is all.
struct Total {
  void* out;
  int32_t dtype;
  int64_t row, column;  // strides of out
  float* sum;
  bool first, last;
};
int multiply_into(const Term* terms, int count, int64_t I, int64_t J, const Total& total);
// out [I][J], whose rows are contiguous and of the dtype of a and b, = sum over m of a[m][i] b[m][j], of
// few m.
constexpr int64_t FEW_OUTER = 4;
int add_outer(const Operand& a, const Operand& b, int64_t M, int64_t I, int64_t J, const Operand& out);
// total[n] = sum over m of a[m][n].
int add_rows(const Operand& a, int64_t M, int64_t N, const Total& total);

// For a few rows x [M], M <= FEW: s [M][LANES] = x times rows n .. n + count - 1 of w, which lie
// contiguous; w has FEWEST rows at least. x comes from pack_few.
constexpr int64_t FEW = 12, FEWEST = 4;
Broadcast pack_few(const Operand& x, int64_t M, int64_t K, float* memory);
int64_t few_floats(int32_t dtype, int64_t M, int64_t K);
void few_rows(float* s, const Broadcast& x, int64_t M, const Operand& w, int64_t n, int64_t count,
              int64_t K);

}  // namespace fasttx::FASTTX_ISA
