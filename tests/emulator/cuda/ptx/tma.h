#pragma once
#include "cuda/numbers.h"
#include "cuda/tensor_map.h"

namespace fasttx {

namespace tma {

struct Coordinates {
  int at[5];
};

// visit(shared address, global address, or null outside the tensor) for every element of the box.
template <class Visit>
void each(const TensorMap& map, uint32_t shared, Coordinates c, Visit visit) {
  uint32_t index[5] = {}, position = 0;
  for (;;) {
    uint64_t offset = 0;
    bool inside = true;
    for (int i = 0; i < 5; i++) {
      const int64_t at = int64_t{c.at[i]} + index[i];
      inside &= at >= 0 && at < static_cast<int64_t>(map.sizes[i]);
      offset += at * map.strides[i];
    }
    const uint32_t address = swizzled(shared + position++ * map.bytes, map.swizzle);
    visit(emulator::shared_pointer(address, map.bytes, map.bytes),
          inside ? map.data + offset : nullptr);
    int i = 0;
    for (; i < 5 && ++index[i] == map.box[i]; i++) index[i] = 0;
    if (i == 5) return;
  }
}

inline uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.bytes;
  for (uint32_t n : map.box) bytes *= n;
  return bytes;
}

inline void check(const TensorMap* map, uint32_t shared, Coordinates& c, int rank) {
  if (map->rank != rank) emulator::fault("a TMA copy of another rank than its tensor map");
  for (int i = rank; i < 5; i++) c.at[i] = 0;
  emulator::shared_pointer(shared, box_bytes(*map), 128);
  // The pattern is a function of the address, so a tile begins where the pattern does.
  if (shared % (128u << static_cast<int>(map->swizzle)))
    emulator::fault("a TMA copy whose shared address is not aligned to its swizzle pattern");
}

inline void load(uint32_t to, const TensorMap* map, uint32_t mbarrier, Coordinates c, int rank) {
  check(map, to, c, rank);
  emulator::mbarrier(mbarrier);
  emulator::land([to, map = *map, mbarrier, c] {
    each(map, to, c, [&](void* shared, const unsigned char* global) {
      if (global)
        memcpy(shared, global, map.bytes), emulator::traffic.read += map.bytes;
      else
        memset(shared, 0, map.bytes);
    });
    emulator::MBarrier& m = emulator::mbarrier(mbarrier);
    m.bytes -= box_bytes(map);
    emulator::mbarrier_progress(m);
  });
}

inline void add(const TensorMap& map, unsigned char* to, const void* from) {
  if (map.element == Element::f32) {
    float x, y;
    memcpy(&x, to, 4);
    memcpy(&y, from, 4);
    x += y;
    memcpy(to, &x, 4);
    return;
  }
  uint16_t x, y;
  memcpy(&x, to, 2);
  memcpy(&y, from, 2);
  if (map.element == Element::bf16)
    x = from_float<bf16>(to_float(bf16{x}) + to_float(bf16{y})).bits;
  else
    x = from_float<f16>(to_float(f16{x}) + to_float(f16{y})).bits;
  memcpy(to, &x, 2);
}

inline void store(const TensorMap* map, uint32_t from, Coordinates c, int rank, bool reduce) {
  check(map, from, c, rank);
  auto copy = [from, map = *map, c, reduce] {
    each(map, from, c, [&](const void* shared, unsigned char* global) {
      if (!global) return;
      emulator::traffic.written += map.bytes;
      if (reduce)
        add(map, global, shared);
      else
        memcpy(global, shared, map.bytes);
    });
  };
  if (emulator::eager())
    copy();
  else
    emulator::running->bulk_open.push_back(copy);
}

}  // namespace tma

inline void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x, int y) {
  tma::load(to, map, mbarrier, {{x, y}}, 2);
}
inline void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x, int y, int z,
                     int w) {
  tma::load(to, map, mbarrier, {{x, y, z, w}}, 4);
}
inline void tma_store(const TensorMap* map, uint32_t from, int x, int y) {
  tma::store(map, from, {{x, y}}, 2, false);
}
inline void tma_store(const TensorMap* map, uint32_t from, int x, int y, int z, int w) {
  tma::store(map, from, {{x, y, z, w}}, 4, false);
}
inline void tma_reduce_add(const TensorMap* map, uint32_t from, int x, int y) {
  tma::store(map, from, {{x, y}}, 2, true);
}
namespace bulk {
inline void check(const void* global, uint32_t shared, uint32_t bytes) {
  emulator::shared_pointer(shared, bytes, 16);
  if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulator::fault("a bulk copy whose size or address is not a multiple of 16");
}
}  // namespace bulk

inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier) {
  bulk::check(from, to, bytes);
  emulator::mbarrier(mbarrier);
  emulator::land([=] {
    memcpy(emulator::shared_pointer(to, bytes, 16), from, bytes);
    emulator::traffic.read += bytes;
    emulator::MBarrier& m = emulator::mbarrier(mbarrier);
    m.bytes -= bytes;
    emulator::mbarrier_progress(m);
  });
}
inline void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes) {
  bulk::check(to, from, bytes);
  auto add = [=] {
    const auto* x = static_cast<const float*>(emulator::shared_pointer(from, bytes, 16));
    for (uint32_t i = 0; i < bytes / 4; i++) to[i] += x[i];
    emulator::traffic.written += bytes;
  };
  if (emulator::eager())
    add();
  else
    emulator::running->bulk_open.push_back(add);
}
inline void tma_commit() {
  emulator::Thread& me = *emulator::running;
  me.bulk_groups.push_back(std::move(me.bulk_open));
  me.bulk_open.clear();
}
template <int N>
void tma_wait_read() {
  auto& groups = emulator::running->bulk_groups;
  for (; groups.size() > N; groups.pop_front())
    for (auto& copy : groups.front()) copy();
}
template <int N>
void tma_wait() {
  tma_wait_read<N>();
}
inline void fence_async() {}

}  // namespace fasttx
