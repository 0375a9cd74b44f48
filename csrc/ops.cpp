// The CPU kernels as torch ops on the stable ABI: unpack tensors, call, turn a status into an error.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "fasttx.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

int32_t dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FASTTX_F32;
    case ScalarType::BFloat16:
      return FASTTX_BF16;
    case ScalarType::Half:
      return FASTTX_F16;
    case ScalarType::Bool:
      return FASTTX_BOOL;
    case ScalarType::Int:
      return FASTTX_I32;
    case ScalarType::Long:
      return FASTTX_I64;
    default:
      STD_TORCH_CHECK(false, "fasttx: this dtype has no CPU kernel");
  }
}

fasttx_tensor view(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() <= 4, "fasttx: tensors of at most 4 dimensions, got ", t.dim());
  fasttx_tensor v = {t.data_ptr(), dtype_of(t), {1, 1, 1, 1}, {0, 0, 0, 0}};
  // An empty tensor has no data pointer, yet is there.
  static int64_t nothing = 0;
  if (!v.data) v.data = &nothing;
  for (int64_t i = 0; i < t.dim(); i++) {
    v.sizes[i] = t.size(i);
    v.strides[i] = t.stride(i);
  }
  return v;
}
fasttx_tensor view(const OptionalTensor& t) { return t.has_value() ? view(*t) : fasttx_tensor{}; }

void check(int status, const char* op) {
  STD_TORCH_CHECK(status == FASTTX_OK, "fasttx ", op, ": ", fasttx_status_text(status));
}

void run_on_torch_threads(int64_t n, void (*task)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(context, i);
  });
}
int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }
[[maybe_unused]] const bool threads_set =
    (fasttx_set_threads(run_on_torch_threads, torch_threads), true);

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

void attention_fwd_cpu(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                       FASTTX_ATTENTION_INPUTS) {
  fasttx_attention a = common(q, k, v, FASTTX_ATTENTION_ARGUMENTS);
  a.out = view(out);
  a.lse = view(lse);
  check(fasttx_attention_fwd_cpu(&a), "attention_fwd");
}

void attention_bwd_cpu(Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dtable, Tensor dout,
                       OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                       FASTTX_ATTENTION_INPUTS, int64_t need) {
  fasttx_attention a = common(q, k, v, FASTTX_ATTENTION_ARGUMENTS);
  a.out = view(out);
  a.lse = view(lse);
  a.dq = view(dq);
  a.dk = view(dk);
  a.dv = view(dv);
  a.dmask = view(dmask);
  a.dtable = view(dtable);
  a.dout = view(dout);
  a.dlse = view(dlse);
  a.need = static_cast<int32_t>(need);
  check(fasttx_attention_bwd_cpu(&a), "attention_bwd");
}

#define FASTTX_SCHEMA_INPUTS                                                                    \
  "Tensor? mask, Tensor? slopes, Tensor? positions, Tensor? table, Tensor? lut, Tensor? cu_q, " \
  "Tensor? cu_k, Tensor? seed, float scale, float softcap, float dropout_p, int left, "         \
  "int right, bool lower_right, int bias_shift"

}  // namespace

STABLE_TORCH_LIBRARY(fasttx_native, m) {
  m.def(
      "attention_fwd_cpu(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, "
      FASTTX_SCHEMA_INPUTS ") -> ()");
  m.def(
      "attention_bwd_cpu(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dmask, "
      "Tensor(e!) dtable, Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, " FASTTX_SCHEMA_INPUTS ", int need) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  m.impl("attention_fwd_cpu", TORCH_BOX(&attention_fwd_cpu));
  m.impl("attention_bwd_cpu", TORCH_BOX(&attention_bwd_cpu));
}
