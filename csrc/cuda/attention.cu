// Attention's launchers: the arguments made ready for the kernels of either architecture, copies of
// tensors that they cannot copy by 16 bytes, the backward's row statistics, and the choice by card.
#include "cuda/tile/careful.h"

namespace fasttx {
namespace {

fasttx_tensor plain_strides(fasttx_tensor t) {
  for (int d = 0; d < 4; d++)
    if (t.sizes[d] == 1) t.strides[d] = 0;
  return t;
}

Attention make_attention(const fasttx_attention& given) {
  Attention p = {};
  p.a = given;
  fasttx_tensor* all[] = {&p.a.out, &p.a.lse,    &p.a.q,   &p.a.k,    &p.a.v,    &p.a.mask,
                          &p.a.slopes, &p.a.positions, &p.a.table, &p.a.lut,   &p.a.dq,   &p.a.dk,
                          &p.a.dv,  &p.a.dmask,  &p.a.dtable, &p.a.dout, &p.a.dlse};
  for (fasttx_tensor* t : all) *t = plain_strides(*t);
  const fasttx_attention& a = p.a;
  p.B = static_cast<int>(a.q.sizes[0]);
  p.H = static_cast<int>(a.q.sizes[1]);
  p.S = static_cast<int>(a.q.sizes[2]);
  p.D = static_cast<int>(a.q.sizes[3]);
  p.G = static_cast<int>(a.k.sizes[1]);
  p.T = static_cast<int>(a.k.sizes[2]);
  p.Dv = static_cast<int>(a.v.sizes[3]);
  p.group = p.G ? p.H / p.G : 1;
  p.sequences = a.cu_q.data ? static_cast<int>(a.cu_q.sizes[0]) - 1 : 0;
  auto bound = [&](int64_t side) {
    const int64_t most = int64_t{p.S} + p.T;
    return side < 0 ? UNBOUNDED : static_cast<int>(side < most ? side : most);
  };
  p.left = bound(a.left);
  p.right = bound(a.right);
  p.mask = !a.mask.data ? NO_MASK : a.mask.sizes[2] == 1 ? MASK_KEYS : MASK_PAIRS;
  const bool capped = a.softcap > 0;
  p.scale = static_cast<float>(capped ? a.scale / a.softcap : a.scale * LOG2E);
  p.cap = capped ? static_cast<float>(a.softcap * LOG2E) : 0.0f;
  p.grad_scale = static_cast<float>(a.scale);
  p.dropout = make_dropout(a.seed.data ? a.dropout_p : 0.0, a.seed.data);
  return p;
}

// Why the kernels cannot copy the rows of [B, H, S, D] by 16 bytes: then they get a copy.
bool by_eight(const fasttx_tensor& t) {
  bool even = (t.sizes[3] == 1 || t.strides[3] == 1) && t.sizes[3] % 8 == 0;
  for (int d = 0; d < 3; d++) even &= t.strides[d] % 8 == 0;
  return even && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}
bool empty(const fasttx_tensor& t) {
  return !(t.sizes[0] && t.sizes[1] && t.sizes[2] && t.sizes[3]);
}
int64_t copy_width(const fasttx_tensor& t) { return (t.sizes[3] + 7) / 8 * 8; }
int64_t copy_floats(const fasttx_tensor& t) {
  if (!t.data || empty(t) || by_eight(t)) return 0;
  return (t.sizes[0] * t.sizes[1] * t.sizes[2] * copy_width(t) / 2 + 3) / 4 * 4;
}

struct Copy {
  fasttx_tensor from;
  uint16_t* to;  // [B, H, S, width], zero from D on
  int width;
  int64_t chunks;
};
__global__ void __launch_bounds__(256) attention_copy(const __grid_constant__ Copy c) {
  const int64_t chunk = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (chunk >= c.chunks) return;
  const int across = c.width / 8, column = static_cast<int>(chunk % across) * 8;
  const int64_t row = chunk / across, s = row % c.from.sizes[2], head = row / c.from.sizes[2];
  const auto* from = static_cast<const uint16_t*>(c.from.data) + s * c.from.strides[2] +
                     head % c.from.sizes[1] * c.from.strides[1] +
                     head / c.from.sizes[1] * c.from.strides[0];
  Words words = {};
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (column + i < c.from.sizes[3])
      words.w[i / 2] |= uint32_t{load(from + (column + i) * c.from.strides[3])} << i % 2 * 16;
  store16(c.to + chunk * 8, words);
}

fasttx_tensor as_copy(fasttx_tensor t, void* to) {
  const int64_t width = copy_width(t);
  t.data = to;
  t.strides[3] = 1;
  t.strides[2] = width;
  t.strides[1] = width * t.sizes[2];
  t.strides[0] = t.strides[1] * t.sizes[1];
  return plain_strides(t);
}

// t becomes a copy in the workspace where the kernels need one.
int make_copy(fasttx_tensor& t, float*& workspace, void* stream) {
  const int64_t floats = copy_floats(t);
  if (!floats) return cudaSuccess;
  const int64_t width = copy_width(t), rows = t.sizes[0] * t.sizes[1] * t.sizes[2];
  auto* to = reinterpret_cast<uint16_t*>(workspace);
  const Copy c = {t, to, static_cast<int>(width), rows * width / 8};
  const int status = launch(attention_copy, dim3(static_cast<unsigned>((c.chunks + 255) / 256)),
                            256, 0, stream, c);
  workspace += floats;
  t = as_copy(t, to);
  return status;
}

// A row with a key has its log-sum-exp rounded at its own size, which is too coarse beyond this:
// such rows get the sum anew, as two numbers.
constexpr float FAR = 1000.0f;

// One warp a row: the row's statistics for the backward.
__global__ void __launch_bounds__(128) attention_rows(const __grid_constant__ Attention p) {
  const fasttx_attention& a = p.a;
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= int64_t{p.B} * p.H * p.S) return;
  const int s = static_cast<int>(row % p.S), head = static_cast<int>(row / p.S % p.H);
  const int batch = static_cast<int>(row / p.S / p.H);
  float x[8], y[8];
  load_lanes(x, a.dout, batch, head, s, p.Dv);
  load_lanes(y, a.out, batch, head, s, p.Dv);
  float delta = dot_lanes(x, y);
  if (a.dlse.data)
    delta -= load(static_cast<const float*>(a.dlse.data) + batch * a.dlse.strides[0] +
                  head * a.dlse.strides[1] + s * a.dlse.strides[2]);
  const float lse = load(static_cast<const float*>(a.lse.data) + batch * a.lse.strides[0] +
                         head * a.lse.strides[1] + s * a.lse.strides[2]);
  float peak = lse == -INFINITY ? INFINITY : lse * LOG2E, log_total = 0.0f;
  if (p.two_numbers && fabsf(lse) > FAR && lse != -INFINITY) {
    const Place at = place_of(p, batch, head);  // packed sequences have no mask
    const Bias b = make_bias(p, at);
    const int i = s - at.row0;
    const Range keys = visible_keys(at, i, 1);
    load_lanes(x, a.q, batch, head, s, p.D);
    float total = 0.0f, bend;
    peak = -INFINITY;
    for (int j = keys.begin; j < keys.end; j++) {
      load_lanes(y, a.k, batch, at.kv_head, at.key0 + j, p.D);
      const float logit = logit_of(p, b, at, dot_lanes(x, y), i, j, bend);
      if (logit == -INFINITY) continue;
      const float top = fmaxf(peak, logit);
      total = total * exp2_approx(peak - top) + exp2_approx(logit - top);
      peak = top;
    }
    log_total = log2f(total);
  }
  if (lane) return;
  store(p.delta + row, delta);
  store(p.peak + row, peak);
  if (p.two_numbers) store(p.log_total + row, log_total);
}

}  // namespace
}  // namespace fasttx

using namespace fasttx;

FASTTX_API int64_t fasttx_cuda_attention_fwd_workspace(const fasttx_attention& given) {
  const Attention p = make_attention(given);
  return copy_floats(p.a.q) + copy_floats(p.a.k) + copy_floats(p.a.v);
}

FASTTX_API int fasttx_cuda_attention_fwd(const fasttx_attention& given, float* workspace,
                                         void* stream) {
  Attention p = make_attention(given);
  if (!row_floats(p)) return cudaSuccess;
  int status = cudaSuccess;
  for (fasttx_tensor* t : {&p.a.q, &p.a.k, &p.a.v})
    if (status == cudaSuccess) status = make_copy(*t, workspace, stream);
  if (status != cudaSuccess) return status;
  const bool hopper = compute_capability() == 90 && !attention_fwd_sm90_refuses(p);
  return hopper ? attention_fwd_sm90(p, stream) : attention_fwd_sm80(p, stream);
}

namespace fasttx {
namespace {

// [B, H, S], each at a multiple of 16 bytes.
int64_t row_array(const Attention& p) { return (row_floats(p) + 3) / 4 * 4; }

Attention make_backward(const fasttx_attention& given) {
  Attention p = make_attention(given);
  p.two_numbers = p.mask != NO_MASK && p.a.mask.dtype != FASTTX_BOOL;
  return p;
}
fasttx_tensor* copied(Attention& p, int i) {
  return i == 0 ? &p.a.q : i == 1 ? &p.a.k : i == 2 ? &p.a.v : &p.a.dout;
}

bool by_hopper(const Attention& p) {
  return compute_capability() == 90 && !attention_bwd_sm90_refuses(p);
}

}  // namespace
}  // namespace fasttx

FASTTX_API int64_t fasttx_cuda_attention_bwd_workspace(const fasttx_attention& given) {
  Attention p = make_backward(given);
  int64_t floats = 3 * row_array(p);
  for (int i = 0; i < 4; i++)
    if (const int64_t copy = copy_floats(*copied(p, i))) {
      floats += copy;
      *copied(p, i) = as_copy(*copied(p, i), nullptr);
    }
  floats += by_hopper(p) ? attention_bwd_sm90_workspace(p) : attention_bwd_sm80_workspace(p);
  return floats;
}

FASTTX_API int fasttx_cuda_attention_bwd(const fasttx_attention& given, float* workspace,
                                         void* stream) {
  Attention p = make_backward(given);
  int status = cudaSuccess;
  for (int i = 0; i < 4 && status == cudaSuccess; i++)
    status = make_copy(*copied(p, i), workspace, stream);
  if (status != cudaSuccess) return status;
  for (float** array : {&p.peak, &p.log_total, &p.delta}) {
    *array = workspace;
    workspace += row_array(p);
  }
  if (row_floats(p))
    status = launch(attention_rows, dim3(static_cast<unsigned>((row_floats(p) + 3) / 4)), 128, 0,
                    stream, p);
  if (status != cudaSuccess) return status;
  return by_hopper(p) ? attention_bwd_sm90(p, workspace, stream)
                      : attention_bwd_sm80(p, workspace, stream);
}
