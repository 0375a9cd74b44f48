// How the attention backward is divided: by the shapes alone, so that no sum depends on the
// threads.
//
// A task is one key head of a batch element or packed sequence, with the query heads of its group.
// A unit is a run of tasks whose mask gradients go to the same fp32 sums. Tasks of a unit run in
// order.
#pragma once
#include "cpu/attention.h"
#include "cpu/attention_bwd_head.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr int64_t FEW_UNITS = 8;  // mask gradients with fewer sums get several partial sums each

// How the gradient of the mask is summed: B, H, rows, columns are the sizes of dmask.
struct MaskPlan {
  MaskGradient kind;
  int64_t B, H, rows, columns;
  float* sums;  // [parts][B][H][rows][columns] fp32; dmask itself, where it is one fp32 part
  int64_t parts, size;
};

struct Backward {
  const fasttx_attention& a;
  Problem p;
  Call call;
  MaskPlan mask;
  int64_t tasks, unit_keys, tasks_a_key, unit_tasks, units;
  int64_t longest_q, longest_k;
  float* bucket_sums;  // [sequences][H][buckets]

  int64_t group() const { return p.H / p.G; }
};

inline Matrix rows_of(const fasttx_tensor& t, int64_t batch, int64_t head, int64_t row) {
  if (!t.data) return {};
  const int64_t offset = batch * t.strides[0] + head * t.strides[1] + row * t.strides[2];
  return {(char*)t.data + offset * element_size(t.dtype), t.dtype, t.strides[2], t.strides[3]};
}

inline float* mask_sums(const Backward& w, int64_t part, int64_t batch, int64_t head) {
  const MaskPlan& m = w.mask;
  const int64_t at = (part * m.B + (m.B > 1 ? batch : 0)) * m.H + (m.H > 1 ? head : 0);
  return m.sums + at * m.rows * m.columns;
}

inline Task make_task(const Backward& w, int64_t sequence, int64_t head, int64_t part) {
  const fasttx_attention& a = w.a;
  const Head h = make_head(w.p, sequence, head);
  Task t = {};
  t.S = h.S;
  t.T = h.T;
  t.index = head;
  t.batch = sequence;
  constexpr int64_t FAR = 1 << 29;
  t.low = (int32_t)max64(-FAR, min64(FAR, h.low));
  t.high = (int32_t)max64(-FAR, min64(FAR, h.high));
  t.q = rows_of(a.q, h.batch, head, h.q0);
  t.k = rows_of(a.k, h.batch, h.kv_head, h.k0);
  t.v = rows_of(a.v, h.batch, h.kv_head, h.k0);
  t.out = rows_of(a.out, h.batch, head, h.q0);
  t.dout = rows_of(a.dout, h.batch, head, h.q0);
  t.dq = rows_of(a.dq, h.batch, head, h.q0);
  t.dk = rows_of(a.dk, h.batch, h.kv_head, h.k0);
  t.dv = rows_of(a.dv, h.batch, h.kv_head, h.k0);
  t.lse_stride = a.lse.strides[2];
  t.lse = (const float*)a.lse.data + h.batch * a.lse.strides[0] + head * a.lse.strides[1] +
          h.q0 * t.lse_stride;
  if (a.dlse.data) {
    t.dlse_stride = a.dlse.strides[2];
    t.dlse = (const float*)a.dlse.data + h.batch * a.dlse.strides[0] + head * a.dlse.strides[1] +
             h.q0 * t.dlse_stride;
  }
  if (a.mask.data) {
    t.mask = {(char*)a.mask.data + mask_offset(w.p, h) * element_size(a.mask.dtype), a.mask.dtype,
              stride_of(a.mask, 2), stride_of(a.mask, 3)};
  }
  if (w.mask.kind == MASK_WRITE) {
    const int64_t at = (h.batch * a.dmask.sizes[1] + head) * t.S * t.T;
    t.dmask = {(char*)a.dmask.data + at * element_size(a.dmask.dtype), a.dmask.dtype, t.T, 1};
  } else if (w.mask.kind != MASK_NONE) {
    t.dmask = {(char*)mask_sums(w, part, h.batch, head), FASTTX_F32, t.T, 1};
  }
  if (a.slopes.data) {
    t.alibi = true;
    t.slope =
        ((const float*)
             a.slopes.data)[sequence * stride_of(a.slopes, 0) + head * stride_of(a.slopes, 1)];
    if (a.positions.data) {
      t.positions = (const float*)a.positions.data + h.batch * stride_of(a.positions, 0);
      t.positions_stride = stride_of(a.positions, 1);
    }
  }
  if (a.table.data) {
    t.table_dtype = a.table.dtype;
    t.table =
        (const char*)a.table.data + head * stride_of(a.table, 1) * element_size(a.table.dtype);
    t.table_stride = stride_of(a.table, 0);
    t.distance_shift = t.T - t.S + a.bias_shift;
    t.bucket_sums = w.bucket_sums + (sequence * w.p.H + head) * w.call.distance.buckets;
  }
  return t;
}

// Sequence and key head of the i-th task of unit `unit`. Tasks are ordered so that those which
// share sums of the mask's gradient follow each other.
struct TaskIndex {
  int64_t sequence, key_head;
};
inline TaskIndex task_index(const Backward& w, int64_t unit, int64_t i) {
  const int64_t units_a_key = w.units / w.unit_keys;
  const int64_t key = unit / units_a_key, rest = unit % units_a_key * w.unit_tasks + i;
  const int64_t G = w.p.G;
  if (w.unit_keys == 1) return {rest / G, rest % G};
  if (w.unit_keys == w.tasks) return {key / G, key % G};
  if (w.mask.B > 1) return {key, rest};
  return {rest, key};
}
inline int64_t tasks_of_unit(const Backward& w, int64_t unit) {
  const int64_t units_a_key = w.units / w.unit_keys;
  return min64(w.unit_tasks, w.tasks_a_key - unit % units_a_key * w.unit_tasks);
}

inline void plan_mask(Backward& w) {
  const fasttx_tensor& t = w.a.dmask;
  MaskPlan& m = w.mask;
  const Problem& p = w.p;
  m = {MASK_NONE, p.sequences, p.H, 0, 0, nullptr, 1, 0};
  w.unit_keys = w.tasks;
  if (w.call.need & NEED_DMASK) {
    m.B = t.sizes[0];
    m.H = t.sizes[1];
    m.rows = t.sizes[2];
    m.columns = t.sizes[3];
    m.size = m.B * m.H * m.rows * m.columns;
    const bool whole_rows = m.rows == p.S, whole_columns = m.columns == p.T;
    if (whole_rows && whole_columns && m.B == p.B && m.H == p.H)
      m.kind = MASK_WRITE;
    else if (whole_rows && whole_columns)
      m.kind = MASK_ADD;
    else if (whole_rows)
      m.kind = MASK_QUERY_SUM;
    else if (whole_columns)
      m.kind = MASK_KEY_SUM;
    else
      m.kind = MASK_SUM;
    w.unit_keys = (m.B > 1 || p.B == 1 ? p.B : 1) * (m.H > 1 || p.H == 1 ? p.G : 1);
  }
  w.tasks_a_key = w.tasks / w.unit_keys;
  const int64_t parts = max64(1, min64(w.tasks_a_key, (FEW_UNITS + w.unit_keys - 1) / w.unit_keys));
  w.unit_tasks = (w.tasks_a_key + parts - 1) / parts;
  m.parts = (w.tasks_a_key + w.unit_tasks - 1) / w.unit_tasks;
  w.units = w.unit_keys * m.parts;
}

}  // namespace
}  // namespace fasttx::FASTTX_ISA
