// The arguments of attention_decode's and cache_append's ops as those of their kernels, and the
// ops' schemas.
#pragma once
#include "cpu/attention_decode.h"
#include "ops.h"

namespace {

// clang-format off
#define FASTTX_DECODE_INPUTS                                                                     \
  Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, OptionalTensor start,                \
  OptionalTensor block_table, OptionalTensor slopes, OptionalTensor positions,                   \
  OptionalTensor table, OptionalTensor lut, double scale, double softcap, int64_t left,          \
  int64_t right
#define FASTTX_DECODE_GIVEN                                                                      \
  q, k_cache, v_cache, lengths, start, block_table, slopes, positions, table, lut, scale,        \
  softcap, left, right
// clang-format on

fasttx_decode decode_arguments(const Tensor& out, FASTTX_DECODE_INPUTS) {
  fasttx_decode a = {};
  a.out = view(out);
  a.q = view(q);
  a.k = view(k_cache);
  a.v = view(v_cache);
  a.lengths = view(lengths);
  a.start = view(start);
  a.block_table = view(block_table);
  a.slopes = view(slopes);
  a.positions = view(positions);
  a.table = view(table);
  a.lut = view(lut);
  a.scale = scale;
  a.softcap = softcap;
  a.left = left;
  a.right = right;
  return a;
}

fasttx_decode append_arguments(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                               const Tensor& v, const Tensor& lengths,
                               const OptionalTensor& block_table) {
  fasttx_decode a = {};
  a.k = view(k_cache);
  a.v = view(v_cache);
  a.k_new = view(k);
  a.v_new = view(v);
  a.lengths = view(lengths);
  a.block_table = view(block_table);
  return a;
}

#define FASTTX_ATTENTION_DECODE_FWD_SCHEMA                                                      \
  "(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? start, "  \
  "Tensor? block_table, Tensor? slopes, Tensor? positions, Tensor? table, Tensor? lut, "        \
  "float scale, float softcap, int left, int right) -> ()"
#define FASTTX_CACHE_APPEND_INPLACE_SCHEMA                                                      \
  "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, "               \
  "Tensor? block_table) -> ()"

}  // namespace
