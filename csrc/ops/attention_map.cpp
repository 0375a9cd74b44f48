// attention_map as a torch op on the stable ABI.
#include "cpu/attention_map.h"

#include "cpu/isa.h"
#include "ops_direct.h"

FASTTX_BY_ISA(int, attention_map_fwd, (const fasttx_attention_map&))

namespace {

std::tuple<Tensor> attention_map_fwd_outputs(
    const Tensor& q, const Tensor& k, const Tensor&, const OptionalTensor& heads,
    const OptionalTensor& rows, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, double, double, int64_t, int64_t, bool, int64_t,
    int64_t pool) {
  const int64_t H = heads.has_value() ? heads->size(0) : q.size(1);
  const int64_t S = rows.has_value() ? rows->size(0) : q.size(2);
  return {empty({q.size(0), H, pool ? pool : S, pool ? pool : k.size(2)}, ScalarType::Float)};
}

void attention_map_fwd_cpu(Tensor out, Tensor q, Tensor k, Tensor lse, OptionalTensor heads,
                           OptionalTensor rows, OptionalTensor mask, OptionalTensor slopes,
                           OptionalTensor positions, OptionalTensor table, OptionalTensor lut,
                           double scale, double softcap, int64_t left, int64_t right,
                           bool lower_right, int64_t bias_shift, int64_t pool) {
  fasttx_attention_map m = {};
  m.a.q = view(q);
  m.a.k = view(k);
  m.a.lse = view(lse);
  m.a.mask = view(mask);
  m.a.slopes = view(slopes);
  m.a.positions = view(positions);
  m.a.table = view(table);
  m.a.lut = view(lut);
  m.a.scale = scale;
  m.a.softcap = softcap;
  m.a.left = left;
  m.a.right = right;
  m.a.lower_right = lower_right;
  m.a.bias_shift = bias_shift;
  m.heads = view(heads);
  m.rows = view(rows);
  m.out = view(out);
  m.pool = pool;
  check(BY_ISA(attention_map_fwd)(m), "attention_map");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fasttx_native, m) {
  m.def(
      "attention_map_fwd_cpu(Tensor(a!) out, Tensor q, Tensor k, Tensor lse, Tensor? heads, "
      "Tensor? rows, Tensor? mask, Tensor? slopes, Tensor? positions, Tensor? table, Tensor? lut, "
      "float scale, float softcap, int left, int right, bool lower_right, int bias_shift, "
      "int pool) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttx_native, CPU, m) {
  implement<&attention_map_fwd_cpu, &attention_map_fwd_outputs>(m, "attention_map_fwd_cpu");
}
