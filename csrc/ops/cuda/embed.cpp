// embed's CUDA kernels as torch ops on the stable ABI. Ids are sorted by torch.
#include "ops/embed.h"

#include <array>

#include "ops/cuda/binding.h"

FASTTX_API int fasttx_cuda_embed_fwd(const fasttx_embed& a, void* stream);
FASTTX_API int64_t fasttx_cuda_embed_bwd_workspace(const fasttx_embed& a);
FASTTX_API int fasttx_cuda_embed_bwd_rows(const fasttx_embed& a, float* workspace, fasttx_rows* dz,
                                          void* stream);
FASTTX_API int fasttx_cuda_embed_positions(const fasttx_embed& a, const fasttx_rows& dz,
                                           void* stream);
FASTTX_API int fasttx_cuda_embed_keys(const fasttx_embed& a, int table, int32_t* keys,
                                      int64_t* order, void* stream);
FASTTX_API int64_t fasttx_cuda_embed_table_workspace(const fasttx_embed& a);
FASTTX_API int fasttx_cuda_embed_table(const fasttx_embed& a, int table, const fasttx_rows& dz,
                                       int32_t* keys, int64_t* order, float* workspace,
                                       void* stream);

namespace {

// Values and where they were, in a stable order.
std::array<Tensor, 2> sorted(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack = {from(keys), from(std::optional<bool>(true)),
                                       from(int64_t{-1}), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

void embed_fwd_cuda(Tensor out, Tensor stats, FASTTX_EMBED_TABLES, FASTTX_EMBED_IDS, double eps,
                    double dropout_p, bool) {
  const fasttx_embed a = forward_arguments(out, stats, FASTTX_EMBED_GIVEN_TABLES,
                                           FASTTX_EMBED_GIVEN_IDS, eps, dropout_p);
  check_cuda(fasttx_cuda_embed_fwd(a, current_stream(out)), "embed_fwd", input_ids, token_weight);
}

void embed_bwd_cuda(Tensor dtoken, Tensor dposition, Tensor dsegment, Tensor dnorm_weight,
                    Tensor dnorm_bias, FASTTX_EMBED_TABLES, Tensor stats, Tensor dout,
                    FASTTX_EMBED_IDS, double dropout_p, int64_t need) {
  const fasttx_embed a = backward_arguments(
      dtoken, dposition, dsegment, dnorm_weight, dnorm_bias, FASTTX_EMBED_GIVEN_TABLES, stats, dout,
      FASTTX_EMBED_GIVEN_IDS, dropout_p, need);
  void* stream = current_stream(dout);
  auto checked = [&](int status) {
    check_cuda(status, "embed_bwd", input_ids, token_weight);
  };
  const Tensor space = workspace(dout, fasttx_cuda_embed_bwd_workspace(a));
  fasttx_rows dz;
  checked(fasttx_cuda_embed_bwd_rows(a, floats(space), &dz, stream));
  for (int table = 0; table < FASTTX_TABLES; table++) {
    if (!(need >> table & 1)) continue;
    if (table == FASTTX_POSITION && !a.ids[table]) {
      checked(fasttx_cuda_embed_positions(a, dz, stream));
      continue;
    }
    STD_TORCH_CHECK(a.rows[table] <= INT32_MAX, "fasttx embed_bwd (CUDA): a table of ",
                    a.rows[table], " rows, at most ", INT32_MAX);
    Tensor keys = torch::stable::new_empty(dout, {a.M}, ScalarType::Int);
    Tensor order = torch::stable::new_empty(dout, {a.ids[table] ? 0 : a.M}, ScalarType::Long);
    auto ids = [&] { return static_cast<int32_t*>(keys.data_ptr()); };
    auto rows = [&] { return static_cast<int64_t*>(order.data_ptr()); };
    if (a.ids[table]) {
      checked(fasttx_cuda_embed_keys(a, table, ids(), nullptr, stream));
      const auto found = sorted(keys);
      keys = found[0];
      order = found[1];
    } else {
      checked(fasttx_cuda_embed_keys(a, table, ids(), rows(), stream));
    }
    const Tensor sums = workspace(dout, fasttx_cuda_embed_table_workspace(a));
    checked(fasttx_cuda_embed_table(a, table, dz, ids(), rows(), floats(sums), stream));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTTX_CUDA_LIBRARY, m) {
  m.def("embed_fwd_cuda" FASTTX_EMBED_FWD_SCHEMA);
  m.def("embed_bwd_cuda" FASTTX_EMBED_BWD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(FASTTX_CUDA_LIBRARY, FASTTX_CUDA_KEY, m) {
  m.impl("embed_fwd_cuda", TORCH_BOX(&embed_fwd_cuda));
  m.impl("embed_bwd_cuda", TORCH_BOX(&embed_bwd_cuda));
}
