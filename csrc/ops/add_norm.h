// The arguments of add_norm's ops as those of its kernels, and the ops' schemas.
#pragma once
#include "cpu/add_norm.h"
#include "ops.h"

namespace {

// Rows are the leading dimensions, at most three; one stride does where they lie evenly.
fasttx_rows rows(const Tensor& t) {
  alignas(16) static int64_t nothing = 0;
  fasttx_rows r = {t.data_ptr(), dtype_of(t), 0, 0, {0, 0, 0}, 0};
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 4, "fasttx: tensors of 1 to 4 dimensions, got ", dims);
  if (!r.data) r.data = &nothing;
  r.column = t.stride(dims - 1);
  bool even = true;
  int64_t inner = 1, sizes[3] = {1, 1, 1};
  for (int64_t d = dims - 2, i = 2; d >= 0; d--, i--) {
    sizes[i] = t.size(d);
    r.stride[i] = t.stride(d);
    if (sizes[i] == 1) continue;
    if (inner == 1)
      r.stride[2] = r.stride[i];
    else if (r.stride[i] != inner * r.stride[2])
      even = false;
    inner *= sizes[i];
  }
  if (!even) {
    for (int64_t d = dims - 2, i = 2; d >= 0; d--, i--) r.stride[i] = t.stride(d);
    r.size1 = sizes[1];
    r.size2 = sizes[2];
  }
  return r;
}
fasttx_rows rows(const OptionalTensor& t) { return t.has_value() ? rows(*t) : fasttx_rows{}; }

// An output that is not wanted is an empty tensor.
fasttx_rows wanted(const Tensor& t) { return t.numel() ? rows(t) : fasttx_rows{}; }

// clang-format off
#define FASTTX_ADD_NORM_INPUTS                                                                    \
  OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, OptionalTensor x_bias,     \
  OptionalTensor seed
// clang-format on

fasttx_add_norm common(const Tensor& x, const Tensor& stats, FASTTX_ADD_NORM_INPUTS,
                       double dropout_p, bool rms) {
  fasttx_add_norm a = {};
  a.x = rows(x);
  a.residual = rows(residual);
  a.weight = rows(weight);
  a.bias = rows(bias);
  a.x_bias = rows(x_bias);
  a.seed = seed.has_value() ? seed->data_ptr() : nullptr;
  a.N = x.size(x.dim() - 1);
  a.M = stats.size(1);
  a.rstd = static_cast<float*>(stats.data_ptr());
  if (!rms) {
    a.mean = a.rstd;
    a.rstd += a.M;
  }
  a.dropout_p = dropout_p;
  a.rms = rms;
  return a;
}

fasttx_add_norm forward_arguments(Tensor out, Tensor total, Tensor stats, Tensor x,
                                  FASTTX_ADD_NORM_INPUTS, double eps, double dropout_p, bool rms) {
  fasttx_add_norm a = common(x, stats, residual, weight, bias, x_bias, seed, dropout_p, rms);
  a.out = rows(out);
  a.total = wanted(total);
  a.eps = eps;
  return a;
}

fasttx_add_norm backward_arguments(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias,
                                   Tensor dx_bias, Tensor x, Tensor stats, OptionalTensor dout,
                                   OptionalTensor dtotal, FASTTX_ADD_NORM_INPUTS, double dropout_p,
                                   bool rms, int64_t need) {
  fasttx_add_norm a = common(x, stats, residual, weight, bias, x_bias, seed, dropout_p, rms);
  a.dout = rows(dout);
  a.dtotal = rows(dtotal);
  a.dx = rows(dx);
  a.dresidual = rows(dresidual);
  a.dweight = rows(dweight);
  a.dbias = rows(dbias);
  a.dx_bias = rows(dx_bias);
  a.need = static_cast<int32_t>(need);
  return a;
}

#define FASTTX_ADD_NORM_SCHEMA_INPUTS \
  "Tensor? residual, Tensor? weight, Tensor? bias, Tensor? x_bias, Tensor? seed, "
#define FASTTX_ADD_NORM_FWD_SCHEMA                                                                \
  "(Tensor(a!) out, Tensor(b!) total, Tensor(c!) stats, Tensor x, " FASTTX_ADD_NORM_SCHEMA_INPUTS \
  "float eps, float dropout_p, bool rms, bool prenorm, bool wide) -> ()"
#define FASTTX_ADD_NORM_BWD_SCHEMA                                               \
  "(Tensor(a!) dx, Tensor(b!) dresidual, Tensor(c!) dweight, Tensor(d!) dbias, " \
  "Tensor(e!) dx_bias, Tensor x, Tensor stats, Tensor? dout, Tensor? "           \
  "dtotal, " FASTTX_ADD_NORM_SCHEMA_INPUTS "float dropout_p, bool rms, int need) -> ()"

}  // namespace
