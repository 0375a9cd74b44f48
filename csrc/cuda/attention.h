// What the attention kernels of every architecture share: the arguments on the device and the
// launchers that csrc/cuda/attention.cu chooses from. Tiles use the words of csrc/cuda/tile.
#pragma once
#include "cuda/numbers.h"
#include "cuda/philox.h"
#include "fasttx.h"

namespace fasttx {

constexpr float LN2 = 0.6931471805599453f;
constexpr float LOWEST = -3.4028234663852886e38f;
constexpr int UNBOUNDED = 1 << 30;  // beyond any index of a row or key

enum MaskKind {
  NO_MASK,
  MASK_KEYS,   // one number a key: [B|1, H|1, 1, T|1]
  MASK_PAIRS,  // any other
};

// Logits are kept in units of log2(e): their exponential is exp2. Only -inf hides a pair; any
// finite number of a mask stays finite.
struct Attention {
  fasttx_attention a;  // dimensions of size 1 have stride 0. q, k, v and, backward, dout: last
                       // stride 1, rows that begin at multiples of 16 bytes (copies where need be)
  int B, H, G, S, T, D, Dv;  // of the tensors: with packed sequences S and T are all rows and keys
  int group;                 // H / G
  int sequences;             // packed; 0: not packed
  int left, right;           // of the band, UNBOUNDED where there is none
  int mask;                  // a MaskKind
  float scale;       // score = scale q k^T in units of log2(e); capped, cap tanh(scale q k^T)
  float cap;         // softcap in units of log2(e); 0: none
  float grad_scale;  // of dq and dk: the op's own scale
  Dropout dropout;
  // Backward, [B, H, S] each: p = exp2(logit - peak - log_total), where log_total is 0 unless
  // two_numbers; peak is +inf for a row without keys. delta = sum of dout out - dlse.
  float *peak, *log_total, *delta;
  int two_numbers;
};

// Whether scores need no more than a factor > 0 and the band.
inline bool is_plain(const Attention& p) {
  const bool biased = p.mask != NO_MASK || p.a.slopes.data || p.a.table.data;
  return !biased && p.cap == 0.0f && p.scale > 0.0f;
}
inline int64_t row_floats(const Attention& p) { return int64_t{p.B} * p.H * p.S; }

// The kernels of an architecture. Every row of out and lse is written; of the gradients those of
// `need`. dmask and dtable go through fp32 sums of a fixed order. A cudaError_t.
int attention_fwd_sm80(const Attention& p, void* stream);
int attention_bwd_sm80(const Attention& p, float* workspace, void* stream);
int64_t attention_bwd_sm80_workspace(const Attention& p);  // floats
int attention_fwd_sm90(const Attention& p, void* stream);
int attention_bwd_sm90(const Attention& p, float* workspace, void* stream);
int64_t attention_bwd_sm90_workspace(const Attention& p);

// Why those of sm_90 leave a call to those of sm_80, or null.
const char* attention_fwd_sm90_refuses(const Attention& p);
const char* attention_bwd_sm90_refuses(const Attention& p);

}  // namespace fasttx
