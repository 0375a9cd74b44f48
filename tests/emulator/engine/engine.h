// One CUDA block at a time on CPU fibers, one fiber a CUDA thread. Fibers change only where a
// thread waits, so what two threads do between two waits is atomic; which warp goes first, and when
// asynchronous copies land, is the configuration's choice.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int WARP = 32, WARPGROUP = 128, BARRIERS = 16;

using Action = std::function<void()>;

struct Thread {
  void* stack_pointer = nullptr;
  dim3 index;
  int linear = 0;
  bool done = false;
  const char* at = "its start";    // what it waits for
  bool (*ready)(void*) = nullptr;  // whether it can go on
  void* ready_context = nullptr;
  std::vector<Action> open;  // cp.async not yet committed
  std::deque<std::vector<Action>> groups;
  std::vector<Action> bulk_open;  // TMA stores
  std::deque<std::vector<Action>> bulk_groups;
  int lane() const { return linear % WARP; }
  int warp() const { return linear / WARP; }
};

// Where the lanes of one instruction come together; operands stay on their own stacks.
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  unsigned generation = 0;
  const void* in[WARPGROUP];
  void* out[WARPGROUP];
};

struct Barrier {
  int arrived = 0, expected = 0;
  unsigned generation = 0;
};

struct MBarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
};

struct Warpgroup {
  Meeting meeting;
  std::vector<Action> open;  // wgmma not yet committed
  std::deque<std::vector<Action>> groups;
  bool fenced = false;
};

struct Block {
  dim3 index, size, grid;
  int alive = 0;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<int> registers;  // of a thread, by warps: together what the block was launched with
  std::map<std::pair<int, unsigned>, Meeting> parts;  // lanes of a warp under a partial mask
  Barrier barriers[BARRIERS];
  std::map<uint32_t, MBarrier> mbarriers;  // by shared address
  std::deque<Action> landings;             // asynchronous copies that have not landed
  unsigned char* shared = nullptr;
  size_t shared_size = 0;
};

// Bytes that kernels moved through the wrappers of csrc/cuda/ptx, and how.
struct Traffic {
  int64_t read, written;     // global memory
  int64_t narrow;            // of these, by accesses of less than 16 bytes
  int64_t shared_conflicts;  // extra cycles that ldmatrix and stmatrix would take on banks
};

extern Block block;
extern Thread* running;
extern Traffic traffic;
extern int compute_capability;  // which kernels an op takes
extern int planted;             // the bug that a test has put into a kernel, 0: none

bool eager();       // asynchronous work is done at once, else as late as waits allow
unsigned random();  // 0 without a seed

// Ends the launch with an error; the launch returns it with the message.
[[noreturn]] void fault(const std::string& message);
void switch_out();

template <class Ready>
void wait(const char* at, Ready ready) {
  if (ready()) return;
  running->at = at;
  running->ready_context = &ready;
  running->ready = [](void* context) { return (*static_cast<Ready*>(context))(); };
  switch_out();
  running->ready = nullptr;
}

// All `count` lanes bring `in`; the last to arrive runs work(in(lane), out(lane)) for all of them.
template <class In, class Out, class Work>
void meet(Meeting& m, int lane, int count, const char* what, const In& in, Out& out, Work work) {
  if (m.arrived == 0)
    m.what = what;
  else if (m.what != what)
    fault(std::string("lanes of one warp are at different instructions: ") + m.what + " and " +
          what);
  m.in[lane] = &in;
  m.out[lane] = &out;
  const unsigned generation = m.generation;
  if (++m.arrived == count) {
    work([&](int i) -> const In& { return *static_cast<const In*>(m.in[i]); },
         [&](int i) -> Out& { return *static_cast<Out*>(m.out[i]); });
    m.arrived = 0;
    m.generation++;
    return;
  }
  wait(what, [&m, generation] { return m.generation != generation; });
}
template <class In, class Out, class Work>
void meet_warp(const char* what, const In& in, Out& out, Work work) {
  meet(block.warps[running->warp()], running->lane(), WARP, what, in, out, work);
}

// bar.sync (arrive_only: bar.arrive); threads == 0: all that have not returned.
void barrier(int id, int threads, bool arrive_only);

// Pointers into shared memory and back; faults outside the block's own.
void* shared_pointer(uint32_t address, size_t bytes, size_t alignment);
uint32_t shared_address(const void* pointer);

MBarrier& mbarrier(uint32_t address);
void mbarrier_progress(MBarrier& m);

// Asynchronous work: when nothing else can go on, or now: always if eager, sometimes with a seed.
void land(Action action);

// Of a block, at most, on the card: what is for sm_80 also serves 8.6, 8.9 and 12.0, which have less.
inline size_t most_shared() { return (compute_capability == 90 ? 227 : 99) << 10; }
// Of a thread, at most, where a block of so many is alone on its multiprocessor.
int launched_registers(int threads);

struct Launch {
  dim3 grid, block;
  size_t shared, shared_allowed;
};
int run(const Launch& launch, const std::function<void()>& kernel);
const char* error_text(int status);

}  // namespace emulator
