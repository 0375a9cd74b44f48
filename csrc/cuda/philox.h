// The dropout bits: Philox4x32-10 (Salmon et al., SC'11). One counter gives eight 16-bit numbers,
// of columns 8 * group .. 8 * group + 7 in order, the low half of a word first.
#pragma once
#include "cuda/platform.h"

namespace fasttx {

struct Dropout {
  const void* seed;    // int64 in device memory
  uint32_t threshold;  // kept where the number is at least this; 0: no dropout
  float scale;         // of what is kept
};

inline Dropout make_dropout(double p, const void* seed) {
  const double t = p * 65536.0 + 0.5;
  const uint32_t threshold = t >= 65535.0 ? 65535 : static_cast<uint32_t>(t);
  return {seed, threshold, 65536.0f / (65536 - threshold)};
}

struct Key {
  uint32_t low, high;
};
FASTTX_DEVICE Key load_key(const Dropout& dropout) {
  if (!dropout.threshold) return {0, 0};
  const uint64_t key = *static_cast<const uint64_t*>(dropout.seed);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

FASTTX_DEVICE void philox(Key key, uint32_t group, uint32_t row, uint32_t head, uint32_t batch,
                          uint32_t (&words)[4]) {
  uint32_t c0 = group, c1 = row, c2 = head, c3 = batch;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key.low;
    c1 = low1;
    c2 = high0 ^ c3 ^ key.high;
    c3 = low0;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Bit i: column 8 * group + i is kept.
FASTTX_DEVICE uint32_t keep_bits(const Dropout& dropout, Key key, uint32_t group, uint32_t row,
                                 uint32_t head = 0, uint32_t batch = 0) {
  uint32_t words[4], bits = 0;
  philox(key, group, row, head, batch, words);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    bits |= static_cast<uint32_t>((words[i] & 0xffff) >= dropout.threshold) << 2 * i;
    bits |= static_cast<uint32_t>((words[i] >> 16) >= dropout.threshold) << (2 * i + 1);
  }
  return bits;
}

// Numbers after dropout, forward or backward: eight neighbours by their bits, or one column's.
FASTTX_DEVICE void drop(const Dropout& dropout, uint32_t kept, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = kept >> i & 1 ? x[i] * dropout.scale : 0.0f;
}
FASTTX_DEVICE float drop(const Dropout& dropout, Key key, int64_t row, int64_t column, float x) {
  if (!dropout.threshold) return x;
  const uint32_t kept =
      keep_bits(dropout, key, static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row));
  return kept >> column % 8 & 1 ? x * dropout.scale : 0.0f;
}

}  // namespace fasttx
