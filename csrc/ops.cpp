// The native op library and its threads; each op adds its kernels in csrc/ops/<op>.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "fasttx.h"

namespace {

void run_on_torch_threads(int64_t n, void (*task)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(context, i);
  });
}
int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }
[[maybe_unused]] const bool threads_set =
    (fasttx_set_threads(run_on_torch_threads, torch_threads), true);

}  // namespace

STABLE_TORCH_LIBRARY(fasttx_native, m) {}
