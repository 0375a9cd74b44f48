// The keys and values of the newest tokens into their caches, eight columns a thread.
#include "cuda/attention_decode.h"

namespace fasttx {
namespace {

struct Append {
  Decode d;
  int k_units, v_units;  // of eight columns
  int even;
  int64_t items;
};

__global__ void __launch_bounds__(256) cache_append(const __grid_constant__ Append p) {
  int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (item >= p.items) return;
  int unit = static_cast<int>(item % (p.k_units + p.v_units));
  item /= p.k_units + p.v_units;
  const int g = static_cast<int>(item % p.d.G);
  item /= p.d.G;
  const int s = static_cast<int>(item % p.d.S), b = static_cast<int>(item / p.d.S);
  const fasttx_decode& a = p.d.a;
  const int length =
      load(static_cast<const int32_t*>(a.lengths.data) + b * a.lengths.strides[0]);
  // A length out of range leaves the cache alone, however large.
  if (length < 0 || length - p.d.S >= p.d.T) return;
  const Slot slot = slot_of(p.d, b, length - p.d.S + s);
  if (slot.owner < 0) return;
  const bool is_k = unit < p.k_units;
  if (!is_k) unit -= p.k_units;
  const fasttx_tensor &from = is_k ? a.k_new : a.v_new, &to = is_k ? a.k : a.v;
  const int width = is_k ? p.d.D : p.d.Dv, column = unit * 8;
  const int64_t source = b * from.strides[0] + g * from.strides[1] + s * from.strides[2];
  const int64_t target = slot_offset(to, slot, g);
  const uint16_t* x = static_cast<const uint16_t*>(from.data) + source;
  uint16_t* y = static_cast<uint16_t*>(to.data) + target;
  if (p.even) {
    store16(y + column, load16_once(x + column));
    return;
  }
  for (int i = column; i < min(column + 8, width); i++)
    store(y + i * to.strides[3], load(x + i * from.strides[3]));
}

}  // namespace
}  // namespace fasttx

// A cudaError_t.
FASTTX_API int fasttx_cuda_cache_append(const fasttx_decode& a, void* stream) {
  using namespace fasttx;
  Append p = {};
  p.d.a = a;
  p.d.G = static_cast<int>(a.k_new.sizes[1]);
  p.d.S = static_cast<int>(a.k_new.sizes[2]);
  p.d.D = static_cast<int>(a.k_new.sizes[3]);
  p.d.Dv = static_cast<int>(a.v_new.sizes[3]);
  p.d.pages = static_cast<int>(a.k.sizes[0]);
  p.d.page = a.block_table.data ? static_cast<int>(a.k.sizes[2]) : 0;
  p.d.T = static_cast<int>(p.d.page ? a.block_table.sizes[1] * p.d.page : a.k.sizes[2]);
  p.k_units = (p.d.D + 7) / 8;
  p.v_units = (p.d.Dv + 7) / 8;
  p.even = p.d.D % 8 == 0 && p.d.Dv % 8 == 0;
  for (const fasttx_tensor* t : {&a.k, &a.v, &a.k_new, &a.v_new}) p.even &= by_eight(*t, 3);
  p.items = a.k_new.sizes[0] * p.d.G * p.d.S * (p.k_units + p.v_units);
  if (!p.items || !p.d.T) return 0;
  const dim3 grid(static_cast<unsigned>((p.items + 255) / 256));
  return launch(cache_append, grid, 256, 0, stream, p);
}
