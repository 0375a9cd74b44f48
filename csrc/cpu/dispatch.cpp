// Which instruction set runs, where threads and scratch memory come from, what the machine is like.
#include <glob.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "fasttx.h"

FASTTX_BY_ISA(void, test_exp2, (const float*, float*, int64_t, int))
FASTTX_BY_ISA(void, test_tanh, (const float*, float*, int64_t))
FASTTX_BY_ISA(void, test_philox,
              (uint32_t*, int64_t, uint64_t, uint32_t, uint32_t, uint32_t, uint32_t))
FASTTX_BY_ISA(void, test_round, (const float*, float*, int64_t, int))

namespace fasttx {

namespace {

constexpr const char* LEVELS[] = {"default", "avx2", "avx512", "avx512bf16"};

int best_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c"))
    return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

fasttx_run_fn run_function = nullptr;
int (*threads_function)() = nullptr;
bool forked = false;

// Kept for the next calls of the thread, freed when it ends.
struct Buffers {
  void* data[SCRATCH_SLOTS] = {};
  size_t size[SCRATCH_SLOTS] = {};
  ~Buffers() {
    for (void* p : data) free(p);
  }
};
thread_local Buffers buffers;

}  // namespace

int cpu_level() {
  static const int chosen = [] {
    const int best = best_level();
    const char* wanted = getenv("FASTTX_CPU_ISA");
    for (int i = 0; wanted && i <= best; i++)
      if (strcmp(wanted, LEVELS[i]) == 0) return i;
    return best;
  }();
  return chosen;
}

int num_workers() {
  if (forked || !run_function) return 1;
  const int n = threads_function();
  return n < 1 ? 1 : n;
}

void run_tasks(int64_t n, void (*task)(void*, int64_t), void* context) {
  if (forked || !run_function) {
    for (int64_t i = 0; i < n; i++) task(context, i);
    return;
  }
  run_function(n, task, context);
}

void* scratch(ScratchSlot slot, size_t bytes) {
  Buffers& b = buffers;
  if (b.size[slot] < bytes) {
    free(b.data[slot]);
    const size_t size = (bytes + 4095) / 4096 * 4096;
    b.data[slot] = aligned_alloc(4096, size);
    b.size[slot] = b.data[slot] ? size : 0;
  }
  return b.data[slot];
}

int64_t cache_bytes() {
  static const int64_t bytes = [] {
    long long kilobytes = 0;
    if (FILE* file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (fscanf(file, "%lldK", &kilobytes) != 1) kilobytes = 0;
      fclose(file);
    }
    return (kilobytes > 0 ? kilobytes : 32 << 10) * 1024;
  }();
  return bytes;
}

bool freed_pages_leave() {
  static const bool leave = [] {
    bool found = false;
    glob_t paths;
    if (glob("/sys/bus/virtio/drivers/virtio_balloon/virtio*/features", 0, nullptr, &paths) == 0) {
      for (size_t i = 0; i < paths.gl_pathc; i++) {
        char bits[7] = "";
        if (FILE* file = fopen(paths.gl_pathv[i], "r")) {
          found |= fgets(bits, sizeof bits, file) && bits[5] == '1';
          fclose(file);
        }
      }
      globfree(&paths);
    }
    return found;
  }();
  return leave;
}

}  // namespace fasttx

const char* fasttx_cpu_isa(void) { return fasttx::LEVELS[fasttx::cpu_level()]; }
const char* fasttx_cpu_isa_name(int i) {
  return i >= 0 && i <= fasttx::best_level() ? fasttx::LEVELS[i] : nullptr;
}
const char* fasttx_status_text(int status) {
  switch (status) {
    case FASTTX_OK:
      return "ok";
    case FASTTX_NOT_BUILT:
      return "this kernel is not built";
    case FASTTX_NO_MEMORY:
      return "out of memory";
    case FASTTX_BAD_DTYPE:
      return "dtype not supported";
    default:
      return "unknown status";
  }
}
void fasttx_set_threads(fasttx_run_fn run, int (*threads)(void)) {
  // The pool of threads does not survive fork(): in the child everything runs on the one thread.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fasttx::forked = true; });
  (void)registered;
  fasttx::threads_function = threads;
  fasttx::run_function = run;
}
void fasttx_test_exp2(const float* x, float* y, int64_t n, int degree) {
  BY_ISA(test_exp2)(x, y, n, degree);
}
void fasttx_test_tanh(const float* x, float* y, int64_t n) { BY_ISA(test_tanh)(x, y, n); }
void fasttx_test_philox(uint32_t* words, int64_t n, uint64_t seed, uint32_t column_group,
                        uint32_t row, uint32_t head, uint32_t batch) {
  BY_ISA(test_philox)(words, n, seed, column_group, row, head, batch);
}
void fasttx_test_round(const float* x, float* y, int64_t n, int to) {
  BY_ISA(test_round)(x, y, n, to);
}
