// Fibers, the scheduler and what a block has of barriers and shared memory.
#include "engine/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Block block;
Thread* running = nullptr;
Traffic traffic;
int compute_capability = 90;
int planted = 0;

namespace {

constexpr size_t STACK = 256 << 10;
constexpr unsigned char POISON = 0xff;  // NaN in every floating type

bool eager_mode = false;
uint32_t seed = 0, state = 0;
std::string message;
bool faulted = false;
void* scheduler_stack = nullptr;
std::vector<char*> stacks;
const std::function<void()>* body = nullptr;
std::mutex one_launch;
int launches_until_refusal = 0;  // 0: none is refused
struct Fault {};  // of work that no thread does itself

extern "C" void fasttx_emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden fasttx_emulator_switch
.globl fasttx_emulator_switch
.type fasttx_emulator_switch,@function
fasttx_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
void leave(const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(nullptr, bottom, size);
}
void enter(const void** bottom, size_t* size) {
  __sanitizer_finish_switch_fiber(nullptr, bottom, size);
}
#endif

void to_scheduler() {
  Thread* me = running;
#if defined(__SANITIZE_ADDRESS__)
  leave(scheduler_bottom, scheduler_size);
#endif
  fasttx_emulator_switch(&me->stack_pointer, scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  enter(&scheduler_bottom, &scheduler_size);
#endif
}

void to_thread(Thread& thread) {
  running = &thread;
#if defined(__SANITIZE_ADDRESS__)
  leave(stacks[thread.linear], STACK);
#endif
  fasttx_emulator_switch(&scheduler_stack, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  enter(nullptr, nullptr);
#endif
  running = nullptr;
}

void release(Barrier& b) {
  b.arrived = b.expected = 0;
  b.generation++;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  enter(&scheduler_bottom, &scheduler_size);
#endif
  (*body)();
  running->done = true;
  block.alive--;
  bool copies = !running->open.empty();
  for (auto& group : running->groups) copies |= !group.empty();
  if (copies) fault("a thread returned with cp.async copies it never waited for");
  // A store is still under way when its thread returns; the block ends when it is done.
  for (auto& group : running->bulk_groups)
    for (auto& action : group) action();
  if (!running->bulk_open.empty()) fault("a thread returned with bulk stores it never committed");
  Barrier& all = block.barriers[0];
  if (all.arrived && all.expected == 0 && all.arrived == block.alive) release(all);
  for (;;) to_scheduler();
}

char* new_stack() {
  void* p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("emulator: no memory for a stack");
    abort();
  }
  mprotect(p, 4096, PROT_NONE);
  return static_cast<char*>(p);
}

// One turn for every thread of a warp that can go on; whether there was one.
bool advance(int warp) {
  bool moved = false;
  const int end = std::min<int>(block.threads.size(), (warp + 1) * WARP);
  for (int i = warp * WARP; i < end && !faulted; i++) {
    Thread& t = block.threads[i];
    if (t.done || (t.ready && !t.ready(t.ready_context))) continue;
    moved = true;
    to_thread(t);
  }
  return moved;
}

std::string where_threads_wait() {
  std::map<std::string, int> places;
  for (const Thread& t : block.threads)
    if (!t.done) places[t.at]++;
  std::string text;
  for (auto& [place, threads] : places)
    text += (text.empty() ? "" : ", ") + std::to_string(threads) + " at " + place;
  return text;
}

void schedule() {
  const int warps = (block.threads.size() + WARP - 1) / WARP;
  while (block.alive && !faulted) {
    bool moved = false;
    if (seed) {
      // A random warp runs ahead, others are left behind for a while.
      for (int i = 0; i < warps; i++) {
        const int warp = random() % warps;
        for (unsigned turns = random() % 6; turns > 0 && !faulted && advance(warp); turns--)
          moved = true;
      }
    }
    if (!moved)
      for (int warp = 0; warp < warps && !faulted; warp++) moved |= advance(warp);
    if (moved || faulted || !block.alive) continue;
    if (block.landings.empty()) {
      message = "deadlock, no thread can go on: " + where_threads_wait();
      faulted = true;
      break;
    }
    // In any order: copies wait for none.
    const auto next = block.landings.begin() + random() % block.landings.size();
    Action action = std::move(*next);
    block.landings.erase(next);
    try {
      action();
    } catch (Fault) {
    }
  }
}

void begin_block(const Launch& launch, dim3 index) {
  const dim3 size = launch.block;
  const int count = size.x * size.y * size.z;
  block.index = index;
  block.size = size;
  block.grid = launch.grid;
  block.alive = count;
  block.threads.assign(count, Thread());
  block.warps.assign((count + WARP - 1) / WARP, Meeting());
  block.warpgroups.assign((count + WARPGROUP - 1) / WARPGROUP, Warpgroup());
  block.registers.assign(block.warps.size(), launched_registers(count));
  block.parts.clear();
  block.mbarriers.clear();
  block.landings.clear();
  for (Barrier& b : block.barriers) b = Barrier();
  memset(block.shared, POISON, block.shared_size);
  for (int i = 0; i < count; i++) {
    Thread& t = block.threads[i];
    t.linear = i;
    t.index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks[i] + 4096, STACK - 4096);
#endif
    void** top = reinterpret_cast<void**>(stacks[i] + STACK);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int k = 0; k < 6; k++) *--top = nullptr;
    t.stack_pointer = top;
  }
}

std::string place() {
  auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  return " in block " + text(block.index) + (running ? " thread " + text(running->index) : "");
}

}  // namespace

bool eager() { return eager_mode; }

unsigned random() {
  if (!state) return 0;
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state;
}

void fault(const std::string& text) {
  message = text + place();
  faulted = true;
  if (!running) throw Fault();
  for (;;) to_scheduler();
}

void switch_out() { to_scheduler(); }

void barrier(int id, int threads, bool arrive_only) {
  if (id < 0 || id >= BARRIERS) fault("barrier " + std::to_string(id) + " of 16");
  if (threads % WARP || threads > static_cast<int>(block.threads.size()))
    fault("a barrier of " + std::to_string(threads) + " threads");
  Barrier& b = block.barriers[id];
  if (b.arrived && b.expected != threads)
    fault("barrier " + std::to_string(id) + " of " + std::to_string(b.expected) +
          " threads and of " + std::to_string(threads));
  b.expected = threads;
  const unsigned generation = b.generation;
  if (++b.arrived == (threads ? threads : block.alive))
    release(b);
  else if (!arrive_only) {
    static const char* const names[BARRIERS] = {
        "barrier 0",  "barrier 1",  "barrier 2",  "barrier 3", "barrier 4",  "barrier 5",
        "barrier 6",  "barrier 7",  "barrier 8",  "barrier 9", "barrier 10", "barrier 11",
        "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
    wait(names[id], [&b, generation] { return b.generation != generation; });
  }
}

void* shared_pointer(uint32_t address, size_t bytes, size_t alignment) {
  if (address % alignment)
    fault("shared address " + std::to_string(address) + " is not aligned to " +
          std::to_string(alignment));
  if (address + bytes > block.shared_size)
    fault("shared address " + std::to_string(address) + " is outside the block's " +
          std::to_string(block.shared_size) + " bytes");
  return block.shared + address;
}

uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(block.shared_size))
    fault("a pointer that is not into the dynamic shared memory");
  return static_cast<uint32_t>(offset);
}

MBarrier& mbarrier(uint32_t address) {
  auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fault("an mbarrier that was not initialized");
  return found->second;
}

void mbarrier_progress(MBarrier& m) {
  if (m.pending < 0) fault("more arrivals at an mbarrier than it was initialized for");
  if (m.pending || m.bytes) return;
  m.phase ^= 1;
  m.pending = m.expected;
}

void land(Action action) {
  if (eager_mode || random() % 4 == 3)
    action();
  else
    block.landings.push_back(std::move(action));
}

int launched_registers(int threads) { return std::min(65536 / threads / 8 * 8, 256); }

int run(const Launch& launch, const std::function<void()>& kernel) {
  std::lock_guard<std::mutex> guard(one_launch);
  faulted = false;
  running = nullptr;
  const dim3 b = launch.block, g = launch.grid;
  const size_t threads = size_t(b.x) * b.y * b.z;
  auto refuse = [&](const std::string& text) {
    message = text;
    return 1;
  };
  if (launches_until_refusal && --launches_until_refusal == 0) return refuse("refused, as asked");
  if (threads == 0 || threads > 1024)
    return refuse("a block of " + std::to_string(threads) + " threads");
  if (!g.x || !g.y || !g.z || g.x > 2147483647u || g.y > 65535 || g.z > 65535)
    return refuse("a grid of (" + std::to_string(g.x) + ", " + std::to_string(g.y) + ", " +
                  std::to_string(g.z) + ") blocks");
  if (launch.shared > launch.shared_allowed)
    return refuse(std::to_string(launch.shared) + " bytes of shared memory, allowed were " +
                  std::to_string(launch.shared_allowed));
  while (stacks.size() < threads) stacks.push_back(new_stack());
  // Exactly what was asked for, so that AddressSanitizer sees an access beyond it.
  block.shared_size = launch.shared;
  block.shared =
      static_cast<unsigned char*>(aligned_alloc(1024, (launch.shared + 1023) / 1024 * 1024 + 1024));
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared + (launch.shared + 7) / 8 * 8, 1024);
#endif
  body = &kernel;
  state = seed ? seed * 2654435761u + 1 : 0;
  const uint64_t blocks = uint64_t(g.x) * g.y * g.z;
  for (uint64_t i = 0; i < blocks && !faulted; i++) {
    const uint64_t at = seed & 1 ? blocks - 1 - i : i;  // no order is promised
    begin_block(launch, dim3(at % g.x, at / g.x % g.y, at / g.x / g.y));
    schedule();
    if (!faulted && !block.landings.empty()) {
      message = "a block ended with asynchronous copies that nobody waited for" + place();
      faulted = true;
    }
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared, launch.shared + 1024);
#endif
  free(block.shared);
  block.shared = nullptr;
  running = nullptr;
  return faulted;
}

const char* error_text(int status) { return status ? message.c_str() : "no error"; }

}  // namespace emulator

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void emulator_configure(int eager, uint32_t seed) {
  emulator::eager_mode = eager;
  emulator::seed = seed;
}
EXPORT void emulator_compute_capability(int sm) { emulator::compute_capability = sm; }
EXPORT void emulator_plant(int bug) { emulator::planted = bug; }
// The n-th launch from now fails.
EXPORT void emulator_refuse(int n) { emulator::launches_until_refusal = n; }
EXPORT const char* emulator_error() { return emulator::message.c_str(); }
EXPORT void emulator_traffic(emulator::Traffic* out) {
  *out = emulator::traffic;
  emulator::traffic = {};
}
