// The arguments of linear's ops as those of its kernels, and the ops' schemas.
#pragma once
#include "cpu/linear.h"
#include "ops.h"

namespace {

fasttx_linear forward_arguments(Tensor out, Tensor pre, Tensor x, Tensor weight,
                                OptionalTensor bias, OptionalTensor residual, int64_t activation,
                                bool keep) {
  fasttx_linear a = {};
  a.out = view(out);
  a.pre = view(pre);
  a.x = view(x);
  a.weight = view(weight);
  a.bias = view(bias);
  a.residual = view(residual);
  a.activation = static_cast<int32_t>(activation);
  a.keep = keep;
  return a;
}

fasttx_linear backward_arguments(Tensor dx, Tensor dweight, Tensor dbias, Tensor x, Tensor weight,
                                 OptionalTensor pre, Tensor dout, int64_t activation,
                                 int64_t need) {
  fasttx_linear a = {};
  a.dx = view(dx);
  a.dweight = view(dweight);
  a.dbias = view(dbias);
  a.x = view(x);
  a.weight = view(weight);
  a.pre = view(pre);
  a.dout = view(dout);
  a.activation = static_cast<int32_t>(activation);
  a.need = static_cast<int32_t>(need);
  return a;
}

#define FASTTX_LINEAR_FWD_SCHEMA                                                              \
  "(Tensor(a!) out, Tensor(b!) pre, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, " \
  "int activation, bool keep) -> ()"
#define FASTTX_LINEAR_BWD_SCHEMA                                                              \
  "(Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, Tensor x, Tensor weight, Tensor? pre, " \
  "Tensor dout, int activation, int need) -> ()"

}  // namespace
