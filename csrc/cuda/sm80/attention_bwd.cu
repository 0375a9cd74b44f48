// The launches of attention's backward for sm_80, and the sums of what its blocks leave apart.
#include "cuda/sm80/attention_bwd.h"

namespace fasttx {

int attention_bwd_rows_bf16(const Backward& f, void* stream);
int attention_bwd_rows_f16(const Backward& f, void* stream);
int attention_bwd_keys_bf16(const Backward& f, void* stream);
int attention_bwd_keys_f16(const Backward& f, void* stream);
int attention_bwd_mask_sm80(const Attention& p, void* stream);

namespace {

// dmask from sums [B, H, S, 1] or [B, H, 1, T]: a warp a number, each lane a share of what it sums.
struct MaskSums {
  fasttx_tensor to;
  const float* sums;
  int64_t sizes[4], count;
};
__global__ void __launch_bounds__(128) attention_mask_sums(const __grid_constant__ MaskSums m) {
  const int64_t element = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (element >= m.count) return;
  int64_t rest = element, from[4], over[4], offset = 0, shares = 1;
#pragma unroll
  for (int d = 3; d >= 0; d--) {
    from[d] = rest % m.to.sizes[d];
    rest /= m.to.sizes[d];
    over[d] = m.to.sizes[d] == m.sizes[d] ? 1 : m.sizes[d];
    offset += from[d] * m.to.strides[d];
    shares *= over[d];
  }
  float sum = 0.0f;
  for (int64_t x = threadIdx.x % 32; x < shares; x += 32) {
    int64_t left = x, step = 1, place = 0;
#pragma unroll
    for (int d = 3; d >= 0; d--) {
      place += (from[d] + left % over[d]) * step;
      left /= over[d];
      step *= m.sizes[d];
    }
    sum += load(m.sums + place);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) store1(m.to.data, m.to.dtype, offset, sum);
}

// sums [B, H, parts, width] to totals [H, width].
struct TableSums {
  Attention p;
  const float* sums;
  float* totals;
  int parts, width, distances;
};
constexpr int SPLITS = 4, COLUMNS = 64;
__global__ void __launch_bounds__(SPLITS* COLUMNS)
    attention_distance_sums(const __grid_constant__ TableSums t) {
  FASTTX_SHARED(shared);
  float* shares = reinterpret_cast<float*>(shared);
  const int column = threadIdx.x % COLUMNS, split = threadIdx.x / COLUMNS;
  const int x = blockIdx.x * COLUMNS + column, head = blockIdx.y;
  float sum = 0.0f;
  if (x < t.width)
    for (int b = 0; b < t.p.B; b++)
#pragma unroll 4
      for (int part = split; part < t.parts; part += SPLITS)
        sum += load(t.sums +
                    ((static_cast<int64_t>(b) * t.p.H + head) * t.parts + part) * t.width + x);
  shares[threadIdx.x] = sum;
  __syncthreads();
  if (split || x >= t.width) return;
  for (int s = 1; s < SPLITS; s++) sum += shares[s * COLUMNS + column];
  store(t.totals + static_cast<int64_t>(head) * t.width + x, sum);
}
// A warp a bucket.
__global__ void __launch_bounds__(128) attention_bucket_sums(const __grid_constant__ TableSums t) {
  const fasttx_tensor &to = t.p.a.dtable, &lut = t.p.a.lut;
  const int bucket = blockIdx.x * 4 + threadIdx.x / 32, head = blockIdx.y;
  if (bucket >= to.sizes[0]) return;
  const int last = static_cast<int>(lut.sizes[0]) - 1;
  float sum = 0.0f;
  for (int x = threadIdx.x % 32; x < t.width; x += 32) {
    const int place = clamped(x - t.distances, 0, last);
    if (load(static_cast<const int32_t*>(lut.data) + place * lut.strides[0]) == bucket)
      sum += load(t.totals + static_cast<int64_t>(head) * t.width + x);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0)
    store1(to.data, to.dtype, bucket * to.strides[0] + head * to.strides[1], sum);
}

struct Layout {
  Backward f;
  float* totals;
  bool by_pairs;  // dmask has both axes
  int distances;
  int64_t floats;
};
Layout lay_out(const Attention& p, float* workspace) {
  Layout l = {};
  Backward& f = l.f;
  f.p = p;
  f.general = !is_plain(p) || p.dropout.threshold || p.two_numbers;
  const int D = p.D > p.Dv ? p.D : p.Dv;
  const int own = D <= 64 ? BackwardShape<64, false>::OWN : 64, keys = 64;
  static_assert(BackwardShape<64, true>::OWN == 64);
  static_assert(BackwardShape<128, true>::OWN == 64);
  static_assert(BackwardShape<128, false>::OWN == 64);
  f.row_tiles = static_cast<int>(tile_count(p.S, p.sequences, own));
  f.key_tiles = static_cast<int>(tile_count(p.T, p.sequences, keys));
  auto take = [&](int64_t count) {
    float* at = workspace + l.floats;
    l.floats += (count + 3) / 4 * 4;
    return at;
  };
  const int64_t heads = int64_t{p.B} * p.H;
  const fasttx_tensor& dmask = p.a.dmask;
  if (p.a.need & 8) {
    l.by_pairs = dmask.sizes[2] > 1 && dmask.sizes[3] > 1;
    if (!l.by_pairs && dmask.sizes[2] > 1) f.row_sums = take(heads * p.S);
    if (!l.by_pairs && dmask.sizes[2] <= 1) f.column_sums = take(heads * p.T);
  }
  if (p.a.need & 16) {
    l.distances = own + BackwardShape<64, false>::OTHER;
    f.table_width = table_width(p, l.distances);
    f.table_sums = take(heads * f.row_tiles * f.table_width);
    l.totals = take(int64_t{p.H} * f.table_width);
  }
  return l;
}

int sum_mask(const Attention& p, const float* sums, bool by_rows, void* stream) {
  const fasttx_tensor& to = p.a.dmask;
  const MaskSums m = {to,
                      sums,
                      {p.B, p.H, by_rows ? p.S : 1, by_rows ? 1 : p.T},
                      to.sizes[0] * to.sizes[1] * to.sizes[2] * to.sizes[3]};
  if (!m.count) return cudaSuccess;
  return launch(attention_mask_sums, dim3(static_cast<unsigned>((m.count + 3) / 4)), 128, 0, stream,
                m);
}
int sum_table(const Layout& l, void* stream) {
  const Attention& p = l.f.p;
  const TableSums t = {p,           l.f.table_sums,     l.totals,
                       l.f.row_tiles, l.f.table_width, l.distances};
  const unsigned heads = static_cast<unsigned>(p.H);
  const unsigned buckets = static_cast<unsigned>(p.a.dtable.sizes[0]);
  if (!heads || !buckets) return cudaSuccess;
  const int status =
      launch(attention_distance_sums, dim3((t.width + COLUMNS - 1) / COLUMNS, heads),
             SPLITS * COLUMNS, SPLITS * COLUMNS * 4, stream, t);
  if (status != cudaSuccess) return status;
  return launch(attention_bucket_sums, dim3((buckets + 3) / 4, heads), 128, 0, stream, t);
}

}  // namespace

int64_t attention_bwd_sm80_workspace(const Attention& p) { return lay_out(p, nullptr).floats; }

int attention_bwd_sm80(const Attention& p, float* workspace, void* stream) {
  const Layout l = lay_out(p, workspace);
  const Backward& f = l.f;
  const bool is_bf16 = p.a.q.dtype == FASTTX_BF16;
  int status = cudaSuccess;
  auto then = [&](bool wanted, auto step) {
    if (wanted && status == cudaSuccess) status = step();
  };
  then((p.a.need & 17) || f.row_sums,
       [&] { return (is_bf16 ? attention_bwd_rows_bf16 : attention_bwd_rows_f16)(f, stream); });
  then((p.a.need & 6) || f.column_sums,
       [&] { return (is_bf16 ? attention_bwd_keys_bf16 : attention_bwd_keys_f16)(f, stream); });
  then(l.by_pairs, [&] { return attention_bwd_mask_sm80(p, stream); });
  then(f.row_sums, [&] { return sum_mask(p, f.row_sums, true, stream); });
  then(f.column_sums, [&] { return sum_mask(p, f.column_sums, false, stream); });
  then(f.table_sums, [&] { return sum_table(l, stream); });
  return status;
}

}  // namespace fasttx
