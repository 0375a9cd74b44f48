// The gradient of softmax's mask: sums over the rows that share a row of it, in parts that are
// added in order.
#pragma once
#include "cuda/softmax.h"

namespace fasttx {

struct MaskPlan {
  int64_t kept[3];             // sizes of the mask
  int64_t shares[3];           // x's where the mask has 1
  int64_t units, shared;       // rows of the mask; rows of x that share one
  int64_t columns;             // of the mask: N, or 1
  int64_t parts, part_rows;    // of the shared rows
  int direct;                  // nothing is shared
};

MaskPlan mask_plan(const fasttx_softmax& a);

// dmask, from p.sums and p.totals of every row. partials: [units, parts, columns].
int softmax_mask_gradient(const Softmax& p, const MaskPlan& plan, float* partials, void* stream);

}  // namespace fasttx
