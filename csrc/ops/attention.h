// The arguments of attention's ops as those of its kernels, and the ops' schemas.
#pragma once
#include "ops.h"

namespace {

// clang-format off
#define FASTTX_ATTENTION_INPUTS                                                                   \
  OptionalTensor mask, OptionalTensor slopes, OptionalTensor positions, OptionalTensor table,     \
  OptionalTensor lut, OptionalTensor cu_q, OptionalTensor cu_k, OptionalTensor seed, double scale, \
  double softcap, double dropout_p, int64_t left, int64_t right, bool lower_right, int64_t bias_shift
// clang-format on

fasttx_attention common(const Tensor& q, const Tensor& k, const Tensor& v,
                        FASTTX_ATTENTION_INPUTS) {
  fasttx_attention a = {};
  a.q = view(q);
  a.k = view(k);
  a.v = view(v);
  a.mask = view(mask);
  a.slopes = view(slopes);
  a.positions = view(positions);
  a.table = view(table);
  a.lut = view(lut);
  a.cu_q = view(cu_q);
  a.cu_k = view(cu_k);
  a.seed = view(seed);
  a.scale = scale;
  a.softcap = softcap;
  a.dropout_p = dropout_p;
  a.left = left;
  a.right = right;
  a.lower_right = lower_right;
  a.bias_shift = bias_shift;
  return a;
}
#define FASTTX_ATTENTION_ARGUMENTS                                                              \
  mask, slopes, positions, table, lut, cu_q, cu_k, seed, scale, softcap, dropout_p, left, right, \
      lower_right, bias_shift

fasttx_attention forward_arguments(const Tensor& out, const Tensor& lse, const Tensor& q,
                                   const Tensor& k, const Tensor& v, FASTTX_ATTENTION_INPUTS) {
  fasttx_attention a = common(q, k, v, FASTTX_ATTENTION_ARGUMENTS);
  a.out = view(out);
  a.lse = view(lse);
  return a;
}

fasttx_attention backward_arguments(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                    const Tensor& dmask, const Tensor& dtable, const Tensor& dout,
                                    const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& out, const Tensor& lse,
                                    FASTTX_ATTENTION_INPUTS, int64_t need) {
  fasttx_attention a = forward_arguments(out, lse, q, k, v, FASTTX_ATTENTION_ARGUMENTS);
  a.dq = view(dq);
  a.dk = view(dk);
  a.dv = view(dv);
  a.dmask = view(dmask);
  a.dtable = view(dtable);
  a.dout = view(dout);
  a.dlse = view(dlse);
  a.need = static_cast<int32_t>(need);
  return a;
}

}  // namespace

#define FASTTX_ATTENTION_SCHEMA                                                                 \
  "Tensor? mask, Tensor? slopes, Tensor? positions, Tensor? table, Tensor? lut, Tensor? cu_q, " \
  "Tensor? cu_k, Tensor? seed, float scale, float softcap, float dropout_p, int left, "         \
  "int right, bool lower_right, int bias_shift"
#define FASTTX_ATTENTION_FWD_SCHEMA \
  "(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, " FASTTX_ATTENTION_SCHEMA ") -> ()"
#define FASTTX_ATTENTION_BWD_SCHEMA                                                            \
  "(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dmask, Tensor(e!) dtable, "        \
  "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "          \
  FASTTX_ATTENTION_SCHEMA ", int need) -> ()"
