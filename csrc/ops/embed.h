// The arguments of embed's ops as those of its kernels, and the ops' schemas.
#pragma once
#include "cpu/embed.h"
#include "ops.h"

namespace {

fasttx_rows rows(const Tensor& t) {
  alignas(16) static int64_t nothing = 0;
  fasttx_rows r = {t.data_ptr(), dtype_of(t), 0, 0, {0, 0, 0}, 0};
  if (!r.data) r.data = &nothing;
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, "fasttx: tensors of 1 to 3 dimensions, got ", dims);
  r.column = t.stride(dims - 1);
  if (dims > 1) r.stride[2] = t.stride(dims - 2);
  if (dims == 3 && t.size(0) > 1 && t.stride(0) != t.size(1) * t.stride(1)) {
    r.size1 = t.size(0);
    r.size2 = t.size(1);
    r.stride[1] = t.stride(0);
  }
  return r;
}
fasttx_rows rows(const OptionalTensor& t) { return t.has_value() ? rows(*t) : fasttx_rows{}; }

const int64_t* values(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
}

// clang-format off
#define FASTTX_EMBED_TABLES                                                                     \
  Tensor token_weight, OptionalTensor position_weight, OptionalTensor segment_weight,           \
  OptionalTensor norm_weight, OptionalTensor norm_bias
#define FASTTX_EMBED_IDS                                                                        \
  Tensor input_ids, OptionalTensor segment_ids, OptionalTensor position_ids, OptionalTensor seed, \
  int64_t start, int64_t padding_idx, int64_t position_padding, int64_t norm, double scale
// clang-format on

fasttx_embed common(FASTTX_EMBED_TABLES, const Tensor& stats, FASTTX_EMBED_IDS, double dropout_p) {
  fasttx_embed a = {};
  a.table[FASTTX_TOKEN] = rows(token_weight);
  a.table[FASTTX_POSITION] = rows(position_weight);
  a.table[FASTTX_SEGMENT] = rows(segment_weight);
  a.rows[FASTTX_TOKEN] = token_weight.size(0);
  a.rows[FASTTX_POSITION] = position_weight.has_value() ? position_weight->size(0) : 0;
  a.rows[FASTTX_SEGMENT] = segment_weight.has_value() ? segment_weight->size(0) : 0;
  a.ids[FASTTX_TOKEN] = static_cast<const int64_t*>(input_ids.data_ptr());
  a.ids[FASTTX_POSITION] = values(position_ids);
  a.ids[FASTTX_SEGMENT] = values(segment_ids);
  a.padding[FASTTX_TOKEN] = padding_idx;
  a.padding[FASTTX_POSITION] = position_padding;
  a.padding[FASTTX_SEGMENT] = -1;
  a.norm_weight = rows(norm_weight);
  a.norm_bias = rows(norm_bias);
  a.seed = seed.has_value() ? seed->data_ptr() : nullptr;
  a.M = input_ids.size(0) * input_ids.size(1);
  a.S = input_ids.size(1);
  a.N = token_weight.size(1);
  a.start = start;
  a.norm = static_cast<int32_t>(norm);
  if (norm) a.rstd = static_cast<float*>(stats.data_ptr());
  if (norm == 1) {
    a.mean = a.rstd;
    a.rstd += a.M;
  }
  a.scale = scale;
  a.dropout_p = dropout_p;
  return a;
}

#define FASTTX_EMBED_COMMON                                                                      \
  common(token_weight, position_weight, segment_weight, norm_weight, norm_bias, stats, input_ids, \
         segment_ids, position_ids, seed, start, padding_idx, position_padding, norm, scale,     \
         dropout_p)

[[maybe_unused]] fasttx_embed forward_arguments(const Tensor& out, const Tensor& stats,
                                                FASTTX_EMBED_TABLES, FASTTX_EMBED_IDS, double eps,
                                                double dropout_p) {
  fasttx_embed a = FASTTX_EMBED_COMMON;
  a.out = rows(out);
  a.eps = eps;
  return a;
}

[[maybe_unused]] fasttx_embed backward_arguments(
    const Tensor& dtoken, const Tensor& dposition, const Tensor& dsegment,
    const Tensor& dnorm_weight, const Tensor& dnorm_bias, FASTTX_EMBED_TABLES, const Tensor& stats,
    const Tensor& dout, FASTTX_EMBED_IDS, double dropout_p, int64_t need) {
  fasttx_embed a = FASTTX_EMBED_COMMON;
  a.dout = rows(dout);
  a.dtable[FASTTX_TOKEN] = rows(dtoken);
  a.dtable[FASTTX_POSITION] = rows(dposition);
  a.dtable[FASTTX_SEGMENT] = rows(dsegment);
  a.dnorm_weight = rows(dnorm_weight);
  a.dnorm_bias = rows(dnorm_bias);
  a.need = static_cast<int32_t>(need);
  return a;
}

// The arguments that the ops hand on.
#define FASTTX_EMBED_GIVEN_TABLES \
  token_weight, position_weight, segment_weight, norm_weight, norm_bias
#define FASTTX_EMBED_GIVEN_IDS                                                                  \
  input_ids, segment_ids, position_ids, seed, start, padding_idx, position_padding, norm, scale

#define FASTTX_SCHEMA_TABLES                                                                  \
  "Tensor token_weight, Tensor? position_weight, Tensor? segment_weight, Tensor? norm_weight, " \
  "Tensor? norm_bias, "
#define FASTTX_SCHEMA_IDS                                                                  \
  "Tensor input_ids, Tensor? segment_ids, Tensor? position_ids, Tensor? seed, int start, " \
  "int padding_idx, int position_padding, int norm, float scale, "
#define FASTTX_EMBED_FWD_SCHEMA                                                               \
  "(Tensor(a!) out, Tensor(b!) stats, " FASTTX_SCHEMA_TABLES FASTTX_SCHEMA_IDS                \
  "float eps, float dropout_p, bool wide) -> ()"
#define FASTTX_EMBED_BWD_SCHEMA                                                               \
  "(Tensor(a!) dtoken, Tensor(b!) dposition, Tensor(c!) dsegment, Tensor(d!) dnorm_weight, "  \
  "Tensor(e!) dnorm_bias, " FASTTX_SCHEMA_TABLES "Tensor stats, Tensor dout, "                \
  FASTTX_SCHEMA_IDS "float dropout_p, int need) -> ()"

}  // namespace
