// The arguments of embed's kernels, forward and backward. Rows are those of input_ids [B, S], in order.
#pragma once
#include "cpu/add_norm.h"

enum { FASTTX_TOKEN, FASTTX_POSITION, FASTTX_SEGMENT, FASTTX_TABLES };

struct fasttx_embed {
  fasttx_rows table[FASTTX_TABLES];   // each row of its own, [rows, N]; data == NULL: absent
  int64_t rows[FASTTX_TABLES];
  const int64_t* ids[FASTTX_TABLES];  // [M]; NULL: position start + m % S, segment 0
  int64_t padding[FASTTX_TABLES];     // backward: the row that gets no gradient, -1 for none
  fasttx_rows norm_weight, norm_bias; // one row each
  fasttx_rows out, dout;              // by rows
  fasttx_rows dtable[FASTTX_TABLES], dnorm_weight, dnorm_bias;  // contiguous
  float* mean;                        // [M], absent for rms and without a norm
  float* rstd;                        // [M], absent without a norm
  const void* seed;
  int64_t M, N, S, start;
  double scale, eps, dropout_p;
  int32_t norm;  // 0 none, 1 layer, 2 rms
  int32_t need;  // backward: tables 1, 2, 4, dnorm_weight 8, dnorm_bias 16
};
