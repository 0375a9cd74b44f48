"""Attention's probabilities exp(logits - lse) in Triton: tiles of the map, or averages over cells.

The launcher takes the inner argument list of fasttx/ops/attention_map.py and fills every element.
"""

import triton
import triton.language as tl

from .common import LOG2E, bias_place, exponential, head_base, load_rows, tile_logits
from .launch import UNSPECIALIZED, Call, device_arch, specialize
from .plan import Plan


@triton.jit
def _chosen(list, n, inside, limit):
    """(the n-th number of a list or n itself, 0 where it does not exist; whether it exists)."""
    at = n
    if list is not None:
        at = tl.load(list + n, mask=inside, other=0).to(tl.int32)
    inside = inside & (at >= 0) & (at < limit)
    return tl.where(inside, at, 0), inside


@triton.jit
def _probabilities(q, keys, lse, i, exists, start, q_stride, k_stride, shape, scale, cap, mask,
                   bias, F: tl.constexpr):  # fmt: skip
    """Rows i against BLOCK_N keys, 0 where hidden."""
    d = tl.arange(0, F.BLOCK_D)
    j = start + tl.arange(0, F.BLOCK_N)
    at = q + (i.to(tl.int64)[:, None] * q_stride[2] + d.to(tl.int64)[None, :] * q_stride[3])
    queries = tl.load(at, mask=exists[:, None] & (d < F.D)[None, :], other=0.0)
    k = load_rows(keys, start, shape[1], (k_stride[2], k_stride[3]), F.D, F.BLOCK_N, F.BLOCK_D,
                  True, F)  # fmt: skip
    product = tl.dot(queries, tl.trans(k), input_precision=F.PRECISION)
    i = tl.where(exists, i, shape[0])
    x, visible, _ = tile_logits(
        product, i[:, None], j[None, :], shape, scale, cap, mask, bias, 0.0, F, True
    )
    shift = tl.load(lse + i, mask=exists, other=float("inf"))
    shift = tl.where(shift == float("-inf"), float("inf"), shift)
    if not F.NATURAL:
        shift = shift * LOG2E
    visible = visible & (x != float("-inf"))
    return tl.where(visible, exponential(x - shift[:, None], F), 0.0)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "chosen_heads", "chosen_rows", "pool"])
def attention_map_kernel(
    out, lse, chosen_head, chosen_row, chosen_heads, chosen_rows, pool,
    q, k, v, mask, slopes, positions, diagonals, cu_q, cu_k, seed,
    q_stride, k_stride, v_stride, mask_stride, slope_stride, position_stride,
    heads, group, S, T, sequences,
    scale, cap, threshold, keep_scale, left, right, bias_shift, reach,
    POOLED: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one head's map, or one cell of its averages."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    if POOLED:
        across = pool
        down = pool
    else:
        across = tl.cdiv(T, BLOCK_N)
        down = tl.cdiv(chosen_rows, BLOCK_M)
    program = tl.program_id(0)
    y = program % across
    x = program // across % down
    pair = (program // across // down).to(tl.int64)
    batch = pair // chosen_heads
    head, known = _chosen(chosen_head, pair % chosen_heads, pair >= 0, heads)
    head = head.to(tl.int32)

    offset = 0
    if F.LOWER_RIGHT:
        offset = T - S
    shape = (S, T, offset, left, right)
    keys = head_base(k, k_stride, batch, head // group, 0)
    queries = head_base(q, q_stride, batch, head, 0)
    lse += (batch * heads + head) * S
    bias, _, _ = bias_place(
        slopes, slope_stride, positions, position_stride, diagonals, batch.to(tl.int32), batch,
        head, sequences, S, T, bias_shift, reach, F)  # fmt: skip
    masking = (0, 0, 0)
    if F.MASK != "none":
        base = mask + batch * mask_stride[0] + head.to(tl.int64) * mask_stride[1]
        masking = (base, mask_stride[2], mask_stride[3])

    r = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    if POOLED:
        first = (x.to(tl.int64) * chosen_rows // pool).to(tl.int32)
        last = (((x + 1).to(tl.int64) * chosen_rows + pool - 1) // pool).to(tl.int32)
        begin = (y.to(tl.int64) * T // pool).to(tl.int32)
        end = (((y + 1).to(tl.int64) * T + pool - 1) // pool).to(tl.int32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for down_index in range(tl.cdiv(last - first, BLOCK_M)):
            top = first + down_index * BLOCK_M
            inside = top + r < last
            i, exists = _chosen(chosen_row, top + r, inside, S)
            exists = exists & known
            for index in range(tl.cdiv(end - begin, BLOCK_N)):
                start = begin + index * BLOCK_N
                p = _probabilities(queries, keys, lse, i, exists, start, q_stride, k_stride, shape,
                                   scale, cap, masking, bias, F)  # fmt: skip
                p = tl.where(exists[:, None], p, float("nan"))
                total += tl.where(inside[:, None] & (start + c < end)[None, :], p, 0.0)
        count = (last - first).to(tl.float32) * (end - begin).to(tl.float32)
        value = tl.where(count > 0, tl.sum(tl.sum(total, 1), 0) / tl.maximum(count, 1.0), 0.0)
        tl.store(out + (pair * pool + x) * pool + y, tl.where(known, value, float("nan")))
    else:
        rows = x * BLOCK_M + r
        inside = rows < chosen_rows
        i, exists = _chosen(chosen_row, rows, inside, S)
        exists = exists & known
        start = y * BLOCK_N
        p = _probabilities(queries, keys, lse, i, exists, start, q_stride, k_stride, shape, scale,
                           cap, masking, bias, F)  # fmt: skip
        p = tl.where(exists[:, None], p, float("nan"))
        to = out + ((pair * chosen_rows + rows)[:, None] * T + (start + c)[None, :])
        tl.store(to, p, mask=inside[:, None] & (start + c < T)[None, :])


def map_calls(arch, out, q, k, lse, heads, rows, mask, slopes, positions, table, lut, scale,
              softcap, left, right, lower_right, bias_shift, pool):  # fmt: skip
    """The kernel calls of one map."""
    plan = Plan.make(
        arch, q, k, k, mask, slopes, positions, table, lut, None, None, None, scale, softcap, 0.0,
        left, right, lower_right, bias_shift,
    )  # fmt: skip
    T = k.size(2)
    h = q.size(1) if heads is None else heads.size(0)
    r = q.size(2) if rows is None else rows.size(0)
    tile = plan.tile("fwd")
    # As large as a cell of the grid, or as the rows there are.
    tall = triton.cdiv(r, pool) if pool else r
    wide = triton.cdiv(T, pool) if pool else T
    block_m = max(16, min(tile.block_m, triton.next_power_of_2(tall)))
    block_n = max(16, min(tile.block_n, triton.next_power_of_2(wide)))
    features = specialize(plan.features, BLOCK_M=block_m, BLOCK_N=block_n)
    cells = pool * pool if pool else triton.cdiv(T, block_n) * triton.cdiv(r, block_m)
    arguments = (
        *(out, lse.contiguous(), *(None if t is None else t.contiguous() for t in (heads, rows))),
        *(h, r, pool, *plan.shared_args(), pool > 0),
    )
    yield from plan.calls
    grid = (q.size(0) * h * cells,)
    warps = min(tile.num_warps, max(1, block_m * block_n // 256))
    yield Call(attention_map_kernel, grid, arguments, features, warps, tile.num_stages)


def attention_map_fwd(out, q, *args):
    """Fill out [B, h, r, T], or [B, h, pool, pool]."""
    for call in map_calls(device_arch(q.device), out, q, *args):
        call.run()
