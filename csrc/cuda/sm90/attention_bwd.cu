// The launches of attention's backward on sm_90.
#include "cuda/sm90/attention_bwd.h"

namespace fasttx {
namespace {

int width_of(const Attention& p) { return (p.D > p.Dv ? p.D : p.Dv) <= 64 ? 64 : 128; }

// The call for the kernels of sm_80: gradients that these do not have.
Attention left_over(const Attention& p) {
  Attention rest = p;
  rest.a.need = 0;
  if (p.mask == MASK_PAIRS) rest.a.need |= p.a.need & 8;
  if (p.a.table.sizes[0] > BWD_BUCKETS) rest.a.need |= p.a.need & 16;
  return rest;
}

// The parts of the workspace; the floats they take.
int64_t lay_out(AttentionBwd& c, const Attention& given, float* workspace) {
  c.p = given;
  Attention& p = c.p;
  p.a.need &= ~left_over(given).a.need;
  c.rows = width_of(p) == 64 ? BwdTile<64>::ROWS : BwdTile<128>::ROWS;
  c.row_tiles = static_cast<int>(tile_count(p.S, p.sequences, c.rows));
  c.key_tiles = static_cast<int>(tile_count(p.T, p.sequences, BWD_KEYS));
  int64_t used = 0;
  auto take = [&](int64_t count) {
    float* at = workspace + used;
    used += (count + 3) / 4 * 4;
    return at;
  };
  const int64_t heads = int64_t{p.B} * p.H, row_tiles = heads * c.row_tiles;
  c.odd_keys = reinterpret_cast<int*>(take(int64_t{p.B} * p.G * c.key_tiles));
  c.odd_rows = reinterpret_cast<int*>(take(row_tiles));
  c.ticket = reinterpret_cast<int*>(take(1));
  c.turns = reinterpret_cast<int*>(take(p.a.need & ORDERED ? row_tiles : 0));
  c.dq = take(p.a.need & 1 ? row_tiles * BWD_DQ : 0);
  c.table_sums = nullptr;
  if (p.a.need & 16) c.table_sums = take(heads * c.key_tiles * 8 * p.a.table.sizes[0]);
  c.zero16 = used / 4;
  c.key_sums = p.a.need & 8 ? take(heads * p.T) : nullptr;
  return used;
}

}  // namespace

const char* attention_bwd_sm90_refuses(const Attention& p) {
  const fasttx_attention& a = p.a;
  if (p.D > 128 || p.Dv > 128) return "a head is wider than 128";
  for (const fasttx_tensor* t : {&a.q, &a.k, &a.v, &a.dout})
    if (const char* reason = tma_refuses(*t)) return reason;
  return nullptr;
}

int64_t attention_bwd_sm90_workspace(const Attention& p) {
  AttentionBwd c = {};
  const Attention rest = left_over(p);
  return lay_out(c, p, nullptr) + (rest.a.need ? attention_bwd_sm80_workspace(rest) : 0);
}

int attention_bwd_sm90(const Attention& p, float* workspace, void* stream) {
  AttentionBwd c = {};
  const int64_t used = lay_out(c, p, workspace);
  if (!make_heads_map(&c.q, p.a.q, c.rows) || !make_heads_map(&c.dout, p.a.dout, c.rows) ||
      !make_heads_map(&c.k, p.a.k, BWD_KEYS) || !make_heads_map(&c.v, p.a.v, BWD_KEYS))
    return cudaErrorInvalidValue;
  const bool general = !is_plain(p) || p.dropout.threshold || p.two_numbers;
  const bool is_bf16 = p.a.q.dtype == FASTTX_BF16;
  int status = attention_bwd_zero(c, stream);
  if (status != cudaSuccess) return status;
  if (width_of(p) == 64)
    status = is_bf16 ? attention_bwd_main_64_bf16(c, general, stream)
                     : attention_bwd_main_64_f16(c, general, stream);
  else
    status = is_bf16 ? attention_bwd_main_128_bf16(c, general, stream)
                     : attention_bwd_main_128_f16(c, general, stream);
  if (status == cudaSuccess) status = attention_bwd_finish(c, stream);
  const Attention rest = left_over(p);
  if (status == cudaSuccess && rest.a.need)
    status = attention_bwd_sm80(rest, workspace + used, stream);
  return status;
}

}  // namespace fasttx
