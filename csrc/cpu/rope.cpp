// Rotary position embedding: y[j] = x[j] c[j] + x[partner of j] s[j], c and s of a few rows made once
// for all heads.
#include "cpu/rope.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int64_t ROWS = 64;  // whose angles are kept in the cache

FASTTX_INLINE vf swap_neighbours(vf x) {
#if FASTTX_AVX512
  return (vf)_mm512_permute_ps((__m512)x, 0xB1);
#elif FASTTX_AVX2
  return (vf)_mm256_permute_ps((__m256)x, 0xB1);
#else
  return (vf)_mm_shuffle_ps((__m128)x, (__m128)x, 0xB1);
#endif
}

template <class T>
void load_row(const T* p, int64_t stride, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += W)
    store(to + i, load_strided(p + i * stride, stride, (int)min64(W, n - i)));
}

void load_angles(const fasttx_tensor& t, int64_t b, int64_t s, float* to) {
  const int64_t at = (t.sizes[0] == 1 ? 0 : b * t.strides[0]) + s * t.strides[1];
  const int64_t stride = t.strides[2], n = t.sizes[2];
  if (t.dtype == FASTTX_F32) load_row((const float*)t.data + at, stride, n, to);
  else if (t.dtype == FASTTX_BF16) load_row((const bf16*)t.data + at, stride, n, to);
  else load_row((const f16*)t.data + at, stride, n, to);
}

// c and s of one row from its cosines and sines; a is the first of a pair, b the second.
void pair_angles(const fasttx_rope& a, const float* cosine, const float* sine, float* c, float* s) {
  const int64_t half = a.rotary / 2;
  const bool twice = a.cos.sizes[2] == half;
  if (a.interleaved) {
    for (int64_t i = 0; i < half; i++) {
      const int64_t first = twice ? i : 2 * i, second = twice ? i : 2 * i + 1;
      c[2 * i] = cosine[first];
      c[2 * i + 1] = cosine[second];
      s[2 * i] = a.adjoint ? sine[second] : -sine[first];
      s[2 * i + 1] = a.adjoint ? -sine[first] : sine[second];
    }
    return;
  }
  const float *cosine_b = cosine + (twice ? 0 : half), *sine_b = sine + (twice ? 0 : half);
  for (int64_t i = 0; i < half; i++) c[i] = cosine[i];
  for (int64_t i = 0; i < half; i++) c[half + i] = cosine_b[i];
  if (a.adjoint) {
    for (int64_t i = 0; i < half; i++) s[i] = sine_b[i];
    for (int64_t i = 0; i < half; i++) s[half + i] = -sine[i];
  } else {
    for (int64_t i = 0; i < half; i++) s[i] = -sine[i];
    for (int64_t i = 0; i < half; i++) s[half + i] = sine_b[i];
  }
}

// One row of one head with its columns side by side. y may be x.
template <class T>
FASTTX_INLINE void turn_row(const T* x, T* y, const float* c, const float* s, int64_t rotary,
                            int64_t D, bool interleaved) {
  if (interleaved) {
    int64_t j = 0;
    for (; j + W <= rotary; j += W) {
      const vf v = load(x + j);
      store(y + j, fma(v, load(c + j), swap_neighbours(v) * load(s + j)));
    }
    if (j < rotary) {
      const int n = (int)(rotary - j);
      const vf v = load_partial(x + j, n);
      store_partial(y + j, fma(v, load(c + j), swap_neighbours(v) * load(s + j)), n);
    }
  } else {
    const int64_t half = rotary / 2;
    int64_t j = 0;
    for (; j + W <= half; j += W) {
      const vf v = load(x + j), w = load(x + half + j);
      store(y + j, fma(v, load(c + j), w * load(s + j)));
      store(y + half + j, fma(w, load(c + half + j), v * load(s + half + j)));
    }
    if (j < half) {
      const int n = (int)(half - j);
      const vf v = load_partial(x + j, n), w = load_partial(x + half + j, n);
      store_partial(y + j, fma(v, load(c + j), w * load(s + j)), n);
      store_partial(y + half + j, fma(w, load(c + half + j), v * load(s + half + j)), n);
    }
  }
  if (x != y && rotary < D) __builtin_memcpy(y + rotary, x + rotary, (D - rotary) * sizeof(T));
}

// Any strides between the columns.
template <class T>
void turn_row_strided(const T* x, int64_t x_stride, T* y, int64_t y_stride, const float* c,
                      const float* s, int64_t rotary, int64_t D, bool interleaved) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i++) {
    const int64_t a = interleaved ? 2 * i : i, b = interleaved ? a + 1 : half + i;
    const float v = to_float(x[a * x_stride]), w = to_float(x[b * x_stride]);
    from_float(v * c[a] + w * s[a], y + a * y_stride);
    from_float(w * c[b] + v * s[b], y + b * y_stride);
  }
  if (x != y)
    for (int64_t j = rotary; j < D; j++) y[j * y_stride] = x[j * x_stride];
}

template <class T>
void turn_rows(const fasttx_rope& a, const fasttx_tensor& x, const fasttx_tensor& y, int64_t b,
               int64_t first, int64_t rows, const float* angles, int64_t padded) {
  const int64_t heads = x.sizes[1], D = x.sizes[3];
  const bool plain = x.strides[3] == 1 && y.strides[3] == 1, interleaved = a.interleaved;
  auto turn = [&](int64_t h, int64_t r) __attribute__((always_inline)) {
    const T* from = (const T*)x.data + b * x.strides[0] + h * x.strides[1] + (first + r) * x.strides[2];
    T* to = (T*)y.data + b * y.strides[0] + h * y.strides[1] + (first + r) * y.strides[2];
    const float *c = angles + r * 2 * padded, *s = c + padded;
    if (plain) turn_row(from, to, c, s, a.rotary, D, interleaved);
    else turn_row_strided(from, x.strides[3], to, y.strides[3], c, s, a.rotary, D, interleaved);
  };
  // Along memory.
  if (x.strides[1] < x.strides[2])
    for (int64_t r = 0; r < rows; r++)
      for (int64_t h = 0; h < heads; h++) turn(h, r);
  else
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = 0; r < rows; r++) turn(h, r);
}

template <class T>
int rotate(const fasttx_rope& a) {
  const int64_t B = a.q.sizes[0], S = a.q.sizes[2];
  const int64_t heads = a.q.sizes[1] + (a.k.data ? a.k.sizes[1] : 0);
  if (!B || !S || !heads || !a.q.sizes[3]) return FASTTX_OK;
  const int64_t padded = round_up(a.rotary, W) + W;  // a vector may be read past the last angle
  const int64_t rows = round_up(max64(1, 65536 / (heads * a.q.sizes[3])), 16);
  const int64_t pieces = (S + rows - 1) / rows;
  int status = FASTTX_OK;
  parallel_items(B * pieces, num_workers(), [&](int64_t, int64_t item) {
    float* memory = (float*)scratch(SCRATCH_TILE, (ROWS + 1) * 2 * padded * sizeof(float));
    if (!memory) {
      __atomic_store_n(&status, FASTTX_NO_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    float *cosine = memory + ROWS * 2 * padded, *sine = cosine + padded;
    const int64_t b = item / pieces, end = min64(S, (item % pieces + 1) * rows);
    for (int64_t first = item % pieces * rows; first < end; first += ROWS) {
      const int64_t n = min64(ROWS, end - first);
      for (int64_t r = 0; r < n; r++) {
        load_angles(a.cos, b, first + r, cosine);
        load_angles(a.sin, b, first + r, sine);
        pair_angles(a, cosine, sine, memory + r * 2 * padded, memory + (2 * r + 1) * padded);
      }
      turn_rows<T>(a, a.q, a.q_out, b, first, n, memory, padded);
      if (a.k.data) turn_rows<T>(a, a.k, a.k_out, b, first, n, memory, padded);
    }
  });
  return status;
}

}  // namespace

int rope(const fasttx_rope& a) {
  switch (a.q.dtype) {
    case FASTTX_F32:
      return rotate<float>(a);
    case FASTTX_BF16:
      return rotate<bf16>(a);
    case FASTTX_F16:
      return rotate<f16>(a);
    default:
      return FASTTX_BAD_DTYPE;
  }
}

}  // namespace fasttx::FASTTX_ISA
