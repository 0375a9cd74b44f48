// Work on memory in long stretches, spread over threads.
#pragma once
#include "cpu/parallel.h"

namespace fasttx {
namespace {

// As parallel_items, each worker beginning with a run of neighbours, so that memory is read in long
// stretches; whoever is through takes from the end of another's.
template <class F>
void parallel_neighbours(int64_t items, int64_t workers, const F& f) {
  constexpr int64_t MOST = 64;
  if (workers > items) workers = items;
  if (workers > MOST) workers = MOST;
  if (workers <= 1 || items > UINT32_MAX) return parallel_items(items, workers, f);
  struct Run {
    alignas(64) uint64_t left;  // first << 32 | end
    // An item of it, or -1.
    int64_t take(bool front) {
      uint64_t now = __atomic_load_n(&left, __ATOMIC_RELAXED);
      for (;;) {
        const uint64_t first = now >> 32, end = now & UINT32_MAX;
        if (first >= end) return -1;
        const uint64_t then = front ? now + (uint64_t{1} << 32) : now - 1;
        if (__atomic_compare_exchange_n(&left, &now, then, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
          return (int64_t)(front ? first : end - 1);
      }
    }
  };
  struct Context {
    const F* f;
    int64_t workers;
    Run runs[MOST];
  } context;
  context.f = &f;
  context.workers = workers;
  for (int64_t i = 0; i < workers; i++)
    context.runs[i].left =
        (uint64_t)(items * i / workers) << 32 | (uint64_t)(items * (i + 1) / workers);
  run_tasks(
      workers,
      [](void* p, int64_t worker) {
        Context* c = static_cast<Context*>(p);
        for (int64_t n = 0; n < c->workers; n++) {
          Run& run = c->runs[(worker + n) % c->workers];
          for (int64_t i; (i = run.take(n == 0)) >= 0;) (*c->f)(worker, i);
        }
      },
      &context);
}

}  // namespace
}  // namespace fasttx
