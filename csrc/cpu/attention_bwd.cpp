// Attention backward: dq, dk, dv and the gradients of an additive mask and of a relative position
// bias, for every feature of the inner op.
//
// Units of attention_bwd_plan.h run in parallel; where there are too few, the key blocks of one
// query head do, and their parts of dq are added in key order, which is also the order of the
// serial loop.
#include "cpu/attention.h"
#include "cpu/attention_bwd_plan.h"
#include "cpu/parallel.h"

namespace fasttx::FASTTX_ISA {
namespace {

constexpr double SERIAL_BELOW = 2e6;  // multiply-adds not worth a second thread

void clear(const fasttx_tensor& t, int64_t from_row = 0) {
  if (!t.data) return;
  for (int64_t i = 0; i < t.sizes[0]; i++)
    for (int64_t j = 0; j < t.sizes[1]; j++)
      for (int64_t r = from_row; r < t.sizes[2]; r++)
        for (int64_t c = 0; c < t.sizes[3]; c++) {
          const int64_t at =
              i * t.strides[0] + j * t.strides[1] + r * t.strides[2] + c * t.strides[3];
          __builtin_memset((char*)t.data + at * element_size(t.dtype), 0, element_size(t.dtype));
        }
}
void clear_dense(const fasttx_tensor& t) {
  int64_t n = element_size(t.dtype);
  for (int64_t size : t.sizes) n *= size;
  if (t.data && n) __builtin_memset(t.data, 0, n);
}

// A task that sees nothing: its gradients are zero.
void clear_task(const Backward& w, const TaskIndex& index) {
  const Head h = make_head(w.p, index.sequence, index.key_head * w.group());
  const auto zero = [&](fasttx_tensor t, int64_t head, int64_t heads, int64_t row, int64_t rows) {
    t.data = rows_of(t, h.batch, head, row).data;
    t.sizes[0] = 1;
    t.sizes[1] = heads;
    t.sizes[2] = rows;
    clear(t);
  };
  if (w.call.need & NEED_DQ) zero(w.a.dq, index.key_head * w.group(), w.group(), h.q0, h.S);
  if (w.call.need & NEED_DK) zero(w.a.dk, index.key_head, 1, h.k0, h.T);
  if (w.call.need & NEED_DV) zero(w.a.dv, index.key_head, 1, h.k0, h.T);
}

// The fp32 sums a unit adds to, or the mask gradients it writes only where pairs are visible.
void clear_mask_gradient(const Backward& w, int64_t unit, int64_t part) {
  if (w.mask.kind == MASK_NONE) return;
  const TaskIndex index = task_index(w, unit, 0);
  const int64_t heads = w.mask.H > 1 ? w.group() : 1;
  for (int64_t r = 0; r < heads; r++) {
    const Task t = make_task(w, index.sequence, index.key_head * w.group() + r, part);
    if (w.mask.kind != MASK_WRITE)
      __builtin_memset(t.dmask.data, 0, w.mask.rows * w.mask.columns * sizeof(float));
    else if (t.low > -t.S || t.high < t.T)
      __builtin_memset(t.dmask.data, 0, t.S * t.T * element_size(t.dmask.dtype));
  }
}

// The query head after head r of task i, also if it belongs to the next unit.
Task following_task(const Backward& w, int64_t unit, int64_t i, int64_t r, int64_t part) {
  if (++r == w.group()) {
    r = 0;
    if (++i == tasks_of_unit(w, unit)) {
      i = 0;
      if (++unit == w.units) return {};
      part = unit % (w.units / w.unit_keys);
    }
  }
  const TaskIndex index = task_index(w, unit, i);
  return make_task(w, index.sequence, index.key_head * w.group() + r, part);
}

// What to prefetch while `task` runs: its outputs and the inputs of `next`.
template <class U>
Prefetch plan_prefetch(const Call& p, const Task& task, const Task& next) {
  Prefetch f = {};
  const auto add = [&](const Matrix& m, int64_t rows, int64_t columns) {
    const int64_t size = element_size(m.dtype);
    if (m.column == 1) f.add(m.data, m.row * size, rows, columns * size);
  };
  add(task.dk, (p.need & NEED_DK) ? task.T : 0, p.D);
  add(task.dv, (p.need & NEED_DV) ? task.T : 0, p.Dv);
  add(task.dq, (p.need & NEED_DQ) ? task.S : 0, p.D);
  add(next.q, next.S, p.D);
  add(next.dout, next.S, p.Dv);
  add(next.out, next.S, p.Dv);
  add(next.k, next.T, p.D);
  add(next.v, next.T, p.Dv);
  // Register tiles of the products of S, dP, dV and dK; those of dQ come on top.
  const int64_t queries = (task.S + BLOCK_Q - 1) / BLOCK_Q, strips = (task.T + STRIP - 1) / STRIP;
  const int64_t columns = (p.D + p.Dv) / (TILE_VECS * W);
  f.plan(queries * strips * STRIP / TILE_ROWS * (2 * VECS / TILE_VECS + columns));
  return f;
}

// One head after the other, on one thread.
template <class U>
bool run_unit(const Backward& w, int64_t unit) {
  const Call& p = w.call;
  const bool grouped = w.group() > 1;
  QuerySide<U> side;
  KeySide<U> block = {};
  KeySums sums, part;
  float *dk, *dv;
  const int64_t keys = grouped ? round_up(w.longest_k, BLOCK_K<U>) : BLOCK_K<U>;
  Arena arena = {nullptr, 0};
  const auto layout = [&](int64_t S, int64_t T) {
    block.take(arena, p);
    dk = arena.take(keys * padded<U>(p.D));
    dv = arena.take(keys * padded<U>(p.Dv));
    side.take(arena, p, S, T);
    sums.template take<U>(arena, p, S, T, true);
    part.template take<U>(arena, p, S, T, false);
  };
  layout(w.longest_q, w.longest_k);
  char* memory = (char*)scratch(SCRATCH_HEAD, arena.used);
  if (!memory) return false;

  const int64_t part_index = unit % (w.units / w.unit_keys);
  clear_mask_gradient(w, unit, part_index);
  for (int64_t i = 0; i < tasks_of_unit(w, unit); i++) {
    const TaskIndex index = task_index(w, unit, i);
    for (int64_t r = 0; r < w.group(); r++) {
      const Task task = make_task(w, index.sequence, index.key_head * w.group() + r, part_index);
      if (task.S == 0 || task.T == 0) {
        clear_task(w, index);
        break;
      }
      arena = {memory, 0};
      layout(task.S, task.T);
      __builtin_memset(sums.touched, 0, side.blocks);
      part.dq = sums.dq;
      part.touched = sums.touched;
      sums.clear_side();
      pack_biases(p, task, side);
      block.prefetch = {};
      for (int64_t b = 0; b < side.blocks; b++) {
        pack_query_block(p, task, side, block.rows, b);
        restore_lse(p, task, side, block, b);
      }
      block.prefetch = plan_prefetch<U>(p, task, following_task(w, unit, i, r, part_index));
      for (int64_t first = 0; first < task.T; first += BLOCK_K<U>) {
        float* dk_block = grouped ? dk + first * padded<U>(p.D) : dk;
        float* dv_block = grouped ? dv + first * padded<U>(p.Dv) : dv;
        key_block(p, task, side, block, part, first, dk_block, dv_block, r == 0);
        sums.add_side(part);
        if (r == w.group() - 1) store_keys<U>(p, task, first, dk_block, dv_block);
      }
      for (int64_t b = 0; b < side.blocks; b++) store_queries<U>(p, task, sums, b);
      store_side_sums(p, task, sums, side.padded_keys);
    }
  }
  return true;
}

// One head after the other, its key blocks in parallel, a wave of `workers` at a time.
template <class U>
bool run_split(const Backward& w, int64_t workers, Arena shared) {
  const Call& p = w.call;
  float* dk = shared.take(round_up(w.longest_k, BLOCK_K<U>) * padded<U>(p.D));
  float* dv = shared.take(round_up(w.longest_k, BLOCK_K<U>) * padded<U>(p.Dv));
  const Arena start = shared;
  bool failed = false;
  const auto block_of_worker = [&](KeySide<U>& block) {
    Arena arena = {nullptr, 0};
    block.take(arena, p);
    arena = {(char*)scratch(SCRATCH_TILE, arena.used), 0};
    block.take(arena, p);
    if (!arena.base) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    return arena.base != nullptr;
  };
  for (int64_t unit = 0; unit < w.units; unit++) {
    const int64_t part_index = unit % (w.units / w.unit_keys);
    clear_mask_gradient(w, unit, part_index);
    for (int64_t i = 0; i < tasks_of_unit(w, unit); i++) {
      const TaskIndex index = task_index(w, unit, i);
      for (int64_t r = 0; r < w.group(); r++) {
        const Task task = make_task(w, index.sequence, index.key_head * w.group() + r, part_index);
        if (task.S == 0 || task.T == 0) {
          clear_task(w, index);
          break;
        }
        shared = start;
        QuerySide<U> side;
        KeySums sums;
        side.take(shared, p, task.S, task.T);
        sums.template take<U>(shared, p, task.S, task.T, true);
        KeySums* parts = shared.template take<KeySums>(workers);
        for (int64_t j = 0; j < workers; j++)
          parts[j].template take<U>(shared, p, task.S, task.T, true);
        __builtin_memset(sums.touched, 0, side.blocks);
        sums.clear_side();
        pack_biases(p, task, side);
        parallel_items(side.blocks, workers, [&](int64_t, int64_t b) {
          KeySide<U> block = {};
          if (!block_of_worker(block)) return;
          pack_query_block(p, task, side, block.rows, b);
          restore_lse(p, task, side, block, b);
        });
        const int64_t blocks = (task.T + BLOCK_K<U> - 1) / BLOCK_K<U>;
        for (int64_t wave = 0; wave < blocks; wave += workers) {
          const int64_t n = min64(workers, blocks - wave);
          parallel_items(n, workers, [&](int64_t, int64_t j) {
            KeySide<U> block = {};
            if (!block_of_worker(block)) return;
            const int64_t first = (wave + j) * BLOCK_K<U>;
            float *dk_block = dk + first * padded<U>(p.D), *dv_block = dv + first * padded<U>(p.Dv);
            __builtin_memset(parts[j].touched, 0, side.blocks);
            key_block(p, task, side, block, parts[j], first, dk_block, dv_block, r == 0);
            if (r == w.group() - 1) store_keys<U>(p, task, first, dk_block, dv_block);
          });
          if (failed) return false;
          for (int64_t j = 0; j < n; j++) sums.add_side(parts[j]);
          if (p.need & NEED_DQ)
            parallel_items(side.blocks, workers, [&](int64_t, int64_t b) {
              const int64_t size = BLOCK_Q * padded<U>(p.D);
              float* to = sums.dq + b * size;
              for (int64_t j = 0; j < n; j++) {
                if (!parts[j].touched[b]) continue;
                const float* from = parts[j].dq + b * size;
                const bool first = !sums.touched[b];
                for (int64_t x = 0; x < size; x += W)
                  store(to + x, first ? load(from + x) : load(to + x) + load(from + x));
                sums.touched[b] = 1;
              }
            });
        }
        parallel_items(side.blocks, workers,
                       [&](int64_t, int64_t b) { store_queries<U>(p, task, sums, b); });
        store_side_sums(p, task, sums, side.padded_keys);
      }
    }
  }
  return true;
}
template <class U>
size_t split_bytes(const Backward& w, int64_t workers) {
  Arena arena = {nullptr, 0};
  arena.take(round_up(w.longest_k, BLOCK_K<U>) * padded<U>(w.call.D));
  arena.take(round_up(w.longest_k, BLOCK_K<U>) * padded<U>(w.call.Dv));
  QuerySide<U> side;
  KeySums sums;
  side.take(arena, w.call, w.longest_q, w.longest_k);
  arena.take<KeySums>(workers);
  for (int64_t j = 0; j <= workers; j++)
    sums.template take<U>(arena, w.call, w.longest_q, w.longest_k, true);
  return arena.used;
}

// The parts of the mask's gradient added in order, rounded once.
void store_mask_gradient(const Backward& w, int64_t workers) {
  const MaskPlan& m = w.mask;
  if (m.kind == MASK_NONE || m.kind == MASK_WRITE || m.sums == w.a.dmask.data) return;
  constexpr int64_t STEP = 1 << 14;
  parallel_items((m.size + STEP - 1) / STEP, workers, [&](int64_t, int64_t item) {
    const int64_t end = min64(m.size, (item + 1) * STEP);
    with_type(w.a.dmask.dtype, w.a.dmask.data, [&](auto* out) {
      for (int64_t i = item * STEP; i < end; i += W) {
        const int n = (int)min64(W, end - i);
        vf sum = load_partial(m.sums + i, n);
        for (int64_t part = 1; part < m.parts; part++)
          sum += load_partial(m.sums + part * m.size + i, n);
        store_strided(out + i, 1, sum, n);
      }
    });
  });
}
void store_table_gradient(const Backward& w) {
  const fasttx_tensor& t = w.a.dtable;
  const int64_t H = w.p.H, buckets = w.call.distance.buckets;
  with_type(t.dtype, t.data, [&](auto* out) {
    for (int64_t i = 0; i < buckets; i++)
      for (int64_t h = 0; h < H; h++) {
        float sum = 0;
        for (int64_t s = 0; s < w.p.sequences; s++) sum += w.bucket_sums[(s * H + h) * buckets + i];
        from_float(sum, out + i * t.strides[0] + h * t.strides[1]);
      }
  });
}

template <class U>
int run(Backward& w) {
  const fasttx_attention& a = w.a;
  const Problem& p = w.p;
  const int need = w.call.need;
  w.tasks = p.sequences * p.G;
  for (int64_t s = 0; s < p.sequences; s++) {
    const Head h = make_head(p, s, 0);
    w.longest_q = max64(w.longest_q, h.S);
    w.longest_k = max64(w.longest_k, h.T);
  }
  if (p.packed) {
    const int64_t q_end = ((const int32_t*)a.cu_q.data)[p.sequences];
    const int64_t k_end = ((const int32_t*)a.cu_k.data)[p.sequences];
    if (need & NEED_DQ) clear(a.dq, q_end);
    if (need & NEED_DK) clear(a.dk, k_end);
    if (need & NEED_DV) clear(a.dv, k_end);
  }
  if (w.tasks == 0 || w.longest_q == 0 || w.longest_k == 0) {
    if (need & NEED_DQ) clear(a.dq);
    if (need & NEED_DK) clear(a.dk);
    if (need & NEED_DV) clear(a.dv);
    if (need & NEED_DMASK) clear_dense(a.dmask);
    if (need & NEED_DTABLE) clear_dense(a.dtable);
    return FASTTX_OK;
  }
  plan_mask(w);
  w.call.mask_gradient = w.mask.kind;

  int64_t workers = num_workers();
  if ((double)w.tasks * w.group() * w.longest_q * w.longest_k * (p.D + p.Dv) < SERIAL_BELOW)
    workers = 1;
  const bool split = w.units < workers && w.longest_k > BLOCK_K<U>;
  const bool own_sums =
      w.mask.kind > MASK_WRITE && (w.mask.parts > 1 || a.dmask.dtype != FASTTX_F32);
  const int64_t distances = w.call.distance.lut ? 2 * w.call.distance.reach + 1 : 0;
  const int64_t bucket_sums = p.sequences * p.H * w.call.distance.buckets;
  Arena shared = {nullptr, 0};
  const auto layout = [&] {
    float* sums = shared.take(own_sums ? w.mask.parts * w.mask.size : 0);
    w.mask.sums = own_sums ? sums : (float*)a.dmask.data;
    w.bucket_sums = shared.take(bucket_sums);
    w.call.distance.edges = shared.take<int32_t>(distances);
  };
  layout();
  char* memory =
      (char*)scratch(SCRATCH_SHARED, 64 + shared.used + (split ? split_bytes<U>(w, workers) : 0));
  if (!memory) return FASTTX_NO_MEMORY;
  shared = {memory, 0};
  layout();
  __builtin_memset(w.bucket_sums, 0, bucket_sums * sizeof(float));
  for (int64_t i = 0, changes = 0; i < distances; i++) {
    const int32_t* lut = w.call.distance.lut;
    if (i > 0 && lut[i] != lut[i - 1]) changes++;
    ((int32_t*)w.call.distance.edges)[i] = (int32_t)changes;
  }

  bool failed = false;
  if (split) {
    failed = !run_split<U>(w, workers, shared);
  } else {
    parallel_items(w.units, workers, [&](int64_t, int64_t unit) {
      if (!run_unit<U>(w, unit)) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    });
  }
  if (failed) return FASTTX_NO_MEMORY;
  store_mask_gradient(w, workers);
  if (need & NEED_DTABLE) store_table_gradient(w);
  return FASTTX_OK;
}

}  // namespace

int attention_bwd(const fasttx_attention& a) {
  Backward w = {a, make_problem(a), {}, {}, 0, 0, 0, 0, 0, 0, 0, nullptr};
  Call& c = w.call;
  c.D = w.p.D;
  c.Dv = w.p.Dv;
  c.scale = w.p.scale;
  c.softcap = w.p.softcap;
  c.need = a.need;
  c.mask_gradient = MASK_NONE;
  c.dropout = w.p.dropout;
  if (a.table.data) {
    c.distance.lut = (const int32_t*)a.lut.data;
    c.distance.reach = a.lut.sizes[0] / 2;
    c.distance.buckets = a.table.sizes[0];
  }
  if constexpr (has_dpbf16)
    if (a.q.dtype == FASTTX_BF16) return run<UnitBF16>(w);
  return run<UnitF32>(w);
}

}  // namespace fasttx::FASTTX_ISA
