// The launches of attention's backward on sm_90.
#include "cuda/sm90/attention_bwd.h"

namespace fasttx {
namespace {

int width_of(const Attention& p) { return max(p.D, p.Dv) <= 64 ? 64 : 128; }

// The parts of the workspace; the floats they take.
int64_t lay_out(AttentionBwd& c, float* workspace) {
  const Attention& p = c.p;
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
  if (max(p.D, p.Dv) > 128) return "a head is wider than 128";
  for (const fasttx_tensor* t : {&a.q, &a.k, &a.v, &a.dout})
    if (const char* reason = tma_refuses(*t)) return reason;
  if ((a.need & 8) && p.mask == MASK_PAIRS) return "the gradient of a mask with a query axis";
  if ((a.need & 16) && a.table.sizes[0] > BWD_BUCKETS)
    return "the gradient of a table of more than 256 buckets";
  return nullptr;
}

int64_t attention_bwd_sm90_workspace(const Attention& p) {
  AttentionBwd c = {};
  c.p = p;
  return lay_out(c, nullptr);
}

int attention_bwd_sm90(const Attention& p, float* workspace, void* stream) {
  AttentionBwd c = {};
  c.p = p;
  lay_out(c, workspace);
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
  return status == cudaSuccess ? attention_bwd_finish(c, stream) : status;
}

}  // namespace fasttx
