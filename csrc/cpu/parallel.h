// Threads, scratch memory and what the machine is like, for the CPU kernels. All live in dispatch.cpp,
// once for all instruction sets.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fasttx {

// Number of workers run_workers() may use: 1 in a forked child, where the parent's thread pool does
// not exist and waiting for it would hang.
int num_workers();

// Calls task(context, i) for i in [0, n). With n <= num_workers() each i has a thread of its own.
void run_tasks(int64_t n, void (*task)(void* context, int64_t i), void* context);

// A 64-byte aligned buffer of the calling thread, kept and grown for later calls. One buffer a slot;
// a later call for the same slot invalidates the earlier pointer. nullptr when memory is exhausted.
enum ScratchSlot { SCRATCH_TILE = 0, SCRATCH_PACK = 1, SCRATCH_HEAD = 2, SCRATCH_SHARED = 3, SCRATCH_SLOTS = 4 };
void* scratch(ScratchSlot slot, size_t bytes);

// The last-level cache that a core can fill. Not sysconf()'s: that adds up those of a whole package.
int64_t cache_bytes();

// Whether this is a guest whose freed pages go back to its host (virtio balloon, free page reporting:
// feature bit 5). Large ones go first, and each is fetched again for more (4 ms measured) than its
// small ones cost; only where pages are most of the work is that still less.
bool freed_pages_leave();

namespace {

// Hands out items 0, 1, 2, ... to whichever worker asks next.
struct WorkQueue {
  int64_t next_item = 0;
  int64_t next() { return __atomic_fetch_add(&next_item, 1, __ATOMIC_RELAXED); }
};

// Runs f(worker, item) for item in [0, items), dynamically scheduled over at most `workers` threads.
// The result of an item must not depend on the worker that ran it.
template <class F>
void parallel_items(int64_t items, int64_t workers, const F& f) {
  if (workers > items) workers = items;
  if (workers <= 1) {
    for (int64_t i = 0; i < items; i++) f(int64_t{0}, i);
    return;
  }
  struct Context {
    const F* f;
    WorkQueue queue;
    int64_t items;
  } context{&f, {}, items};
  run_tasks(
      workers,
      [](void* p, int64_t worker) {
        Context* c = static_cast<Context*>(p);
        for (int64_t i; (i = c->queue.next()) < c->items;) (*c->f)(worker, i);
      },
      &context);
}

}  // namespace
}  // namespace fasttx
