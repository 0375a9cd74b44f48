// rope: each thread turns eight pairs (GPT-NeoX: two times eight columns half a head apart; GPT-J:
// eight neighbours, four pairs) of up to four heads with the angles it has read once; other columns
// are copied. Odd strides and widths go one pair a thread.
#include "cpu/rope.h"

#include "cuda/eight.h"

namespace fasttx {
namespace {

constexpr int HEADS = 4, THREADS = 256;

struct Rope {
  fasttx_rope a;
  int64_t items, sequence;  // of the whole call; S
  int turned, copied;       // items of HEADS heads of a token: pairs to turn, columns to copy
  int heads, groups;        // heads of q and k together; by HEADS
  int q_heads;
  int pair_angles;  // cos and sin have an angle a pair
};

struct Place {
  int64_t b, s;
  int unit, group;
};

FASTTX_DEVICE Place place(const Rope& p, int64_t item) {
  const int units = p.turned + p.copied;
  Place at;
  at.unit = static_cast<int>(item % units);
  item /= units;
  at.group = static_cast<int>(item % p.groups);
  item /= p.groups;
  at.s = item % p.sequence;
  at.b = item / p.sequence;
  return at;
}

FASTTX_DEVICE int64_t head_offset(const fasttx_tensor& t, const Place& at, int head) {
  return at.b * t.strides[0] + head * t.strides[1] + at.s * t.strides[2];
}
FASTTX_DEVICE int64_t angle_offset(const fasttx_tensor& t, const Place& at) {
  return (t.sizes[0] > 1 ? at.b * t.strides[0] : 0) + at.s * t.strides[1];
}

// cos or sin of eight columns; twice: of four pairs, each twice.
FASTTX_DEVICE void load_angles(const fasttx_tensor& t, int64_t offset, int column, bool twice,
                               float (&v)[8]) {
  if (!twice) {
    unpack8(load8(t.data, t.dtype, offset + column), t.dtype, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    v[i] = v[i + 1] = load1(t.data, t.dtype, offset + (column + i) / 2);
}

template <bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) rope_by_eight(const __grid_constant__ Rope p) {
  const int64_t item = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (item >= p.items) return;
  const Place at = place(p, item);
  const fasttx_rope& a = p.a;
  const int first = at.group * HEADS, half = static_cast<int>(a.rotary / 2);
  const bool turn = at.unit < p.turned;
  // The columns of the unit: one chunk, or the first of two.
  const int column = turn ? at.unit * 8 : static_cast<int>(a.rotary) + (at.unit - p.turned) * 8;
  constexpr int CHUNKS = INTERLEAVED ? 1 : 2;

  Words x[HEADS][CHUNKS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    const int head = first + h;
    if (head >= p.heads) continue;
    const bool is_q = head < p.q_heads;
    const fasttx_tensor& from = is_q ? a.q : a.k;
    const auto* row = static_cast<const uint16_t*>(from.data) +
                      head_offset(from, at, is_q ? head : head - p.q_heads);
    x[h][0] = load16_once(row + column);
    if (!INTERLEAVED && turn) x[h][CHUNKS - 1] = load16_once(row + column + half);
  }
  float cos[CHUNKS][8], sin[CHUNKS][8];
  if (turn) {
    const int64_t c = angle_offset(a.cos, at), s = angle_offset(a.sin, at);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
      const int from = column + (p.pair_angles ? 0 : k * half);
      load_angles(a.cos, c, from, INTERLEAVED && p.pair_angles, cos[k]);
      load_angles(a.sin, s, from, INTERLEAVED && p.pair_angles, sin[k]);
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    const int head = first + h;
    if (head >= p.heads) continue;
    const bool is_q = head < p.q_heads;
    const fasttx_tensor& to = is_q ? a.q_out : a.k_out;
    auto* row =
        static_cast<uint16_t*>(to.data) + head_offset(to, at, is_q ? head : head - p.q_heads);
    if (!turn) {
      store16(row + column, x[h][0]);
      continue;
    }
    float u[8], v[8], y[8], z[8];
    unpack8(x[h][0], a.q.dtype, u);
    if (INTERLEAVED) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        y[i] = a.adjoint ? u[i] * cos[0][i] + u[i + 1] * sin[0][i + 1]
                         : u[i] * cos[0][i] - u[i + 1] * sin[0][i];
        y[i + 1] = a.adjoint ? u[i + 1] * cos[0][i + 1] - u[i] * sin[0][i]
                             : u[i + 1] * cos[0][i + 1] + u[i] * sin[0][i + 1];
      }
      store16(row + column, pack8(y, a.q.dtype));
    } else {
      unpack8(x[h][CHUNKS - 1], a.q.dtype, v);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float ca = cos[0][i], cb = cos[CHUNKS - 1][i], sa = sin[0][i],
                    sb = sin[CHUNKS - 1][i];
        y[i] = a.adjoint ? u[i] * ca + v[i] * sb : u[i] * ca - v[i] * sa;
        z[i] = a.adjoint ? v[i] * cb - u[i] * sa : v[i] * cb + u[i] * sb;
      }
      store16(row + column, pack8(y, a.q.dtype));
      store16(row + column + half, pack8(z, a.q.dtype));
    }
  }
}

__global__ void __launch_bounds__(THREADS) rope_by_one(const __grid_constant__ Rope p) {
  const int64_t item = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (item >= p.items) return;
  const Place at = place(p, item);
  const fasttx_rope& a = p.a;
  const bool turn = at.unit < p.turned;
  const int64_t half = a.rotary / 2;
  const int64_t n0 = !turn ? a.rotary + at.unit - p.turned : a.interleaved ? 2 * at.unit : at.unit;
  const int64_t n1 = a.interleaved ? n0 + 1 : n0 + half;
  float cos[2], sin[2];
  if (turn)
    for (int k = 0; k < 2; k++) {
      const int64_t n = p.pair_angles ? at.unit : k ? n1 : n0;
      cos[k] = load1(a.cos.data, a.cos.dtype, angle_offset(a.cos, at) + n * a.cos.strides[2]);
      sin[k] = load1(a.sin.data, a.sin.dtype, angle_offset(a.sin, at) + n * a.sin.strides[2]);
    }
  for (int h = 0; h < HEADS && at.group * HEADS + h < p.heads; h++) {
    const int head = at.group * HEADS + h;
    const bool is_q = head < p.q_heads;
    const int own = is_q ? head : head - p.q_heads;
    const fasttx_tensor &from = is_q ? a.q : a.k, &to = is_q ? a.q_out : a.k_out;
    const auto* x = static_cast<const uint16_t*>(from.data) + head_offset(from, at, own);
    auto* y = static_cast<uint16_t*>(to.data) + head_offset(to, at, own);
    if (!turn) {
      store(y + n0 * to.strides[3], load(x + n0 * from.strides[3]));
      continue;
    }
    const int dtype = a.q.dtype;
    const float f = load1(x, dtype, n0 * from.strides[3]),
                g = load1(x, dtype, n1 * from.strides[3]);
    store1(y, dtype, n0 * to.strides[3],
           a.adjoint ? f * cos[0] + g * sin[1] : f * cos[0] - g * sin[0]);
    store1(y, dtype, n1 * to.strides[3],
           a.adjoint ? g * cos[1] - f * sin[0] : g * cos[1] + f * sin[1]);
  }
}

int rotate(Rope p, bool even, void* stream) {
  const int64_t D = p.a.q.sizes[3], R = p.a.rotary;
  p.turned = static_cast<int>(!even ? R / 2 : p.a.interleaved ? R / 8 : R / 16);
  p.copied = static_cast<int>(even ? (D - R) / 8 : D - R);
  p.items = p.a.q.sizes[0] * p.sequence * p.groups * (p.turned + p.copied);
  if (p.items == 0) return 0;
  const dim3 grid(static_cast<unsigned>((p.items + THREADS - 1) / THREADS));
  if (!even) return launch(rope_by_one, grid, THREADS, 0, stream, p);
  return launch(p.a.interleaved ? rope_by_eight<true> : rope_by_eight<false>, grid, THREADS, 0,
                stream, p);
}

}  // namespace
}  // namespace fasttx

// A cudaError_t.
FASTTX_API int fasttx_cuda_rope(const fasttx_rope& a, void* stream) {
  using namespace fasttx;
  Rope p = {a, 0, a.q.sizes[2], 0, 0, 0, 0, 0, 0};
  if (!a.k.data) p.a.k_out.data = nullptr;
  p.q_heads = static_cast<int>(a.q.sizes[1]);
  p.heads = p.q_heads + (a.k.data ? static_cast<int>(a.k.sizes[1]) : 0);
  p.groups = (p.heads + HEADS - 1) / HEADS;
  p.pair_angles = a.cos.sizes[2] != a.rotary;
  bool even = a.rotary % (a.interleaved ? 8 : 16) == 0 && a.q.sizes[3] % 8 == 0;
  for (const fasttx_tensor* t : {&p.a.q, &p.a.k, &p.a.q_out, &p.a.k_out}) even &= by_eight(*t, 3);
  for (const fasttx_tensor* t : {&a.cos, &a.sin}) even &= by_eight(*t, 2);
  return rotate(p, even, stream);
}
