"""Attention in Triton: the forward kernel and the launchers that fill the op's outputs.

    logits = softcap(scale * q k^T) + position bias + mask;  out = dropout(softmax(logits)) v

`attention_fwd` and `attention_bwd` take the op's inner argument list, validate nothing, allocate
only O(S) scratch a head and write every element of the outputs they are given.
"""

import triton
import triton.language as tl

from .attention_bwd import backward_calls
from .common import (
    LN2,
    any_nonfinite,
    bias_place,
    block_ranges,
    careful_start,
    dropout_keep,
    dropout_place,
    edge_block,
    edge_count,
    exponential,
    full_block,
    full_count,
    head_base,
    load_rows,
    nonfinite_reaching,
    operand,
    place,
    store_rows,
    tile_logits,
    tile_visible,
    visible_keys,
    zero_nonfinite,
)
from .launch import UNSPECIALIZED, Call, device_arch, specialize
from .plan import Plan


@triton.jit
def _fwd_step(acc, total, peak, q, keys, values, start, first, shape, scale, cap, mask, bias, far,
              dropout, k_stride, v_stride, F: tl.constexpr, EDGE: tl.constexpr,
              SAFE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One step of the online softmax: the sums of ROWS rows over COLUMNS more keys.

    SAFE leaves out NaN and Inf of values.
    """
    T = shape[1]
    i = first + tl.arange(0, ROWS)
    j = start + tl.arange(0, COLUMNS)
    q = operand(q, first, start, shape[0], F.D, ROWS, F.BLOCK_D, F, F.FP32 and F.BLOCK_M == 16)
    k = load_rows(keys, start, T, k_stride, F.D, COLUMNS, F.BLOCK_D, EDGE, F)
    product = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    PLAIN: tl.constexpr = (
        F.POSITIVE_SCALE and F.BIAS == "none" and F.MASK == "none" and not F.SOFTCAP and not EDGE
    )
    if PLAIN:
        new_peak = tl.maximum(peak, tl.max(product, 1) * scale)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = exponential(product * scale - shift[:, None], F)
    else:
        x, _, _ = tile_logits(
            product, i[:, None], j[None, :], shape, scale, cap, mask, bias, far, F, EDGE
        )
        new_peak = tl.maximum(peak, tl.max(x, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = exponential(x - shift[:, None], F)
    decay = exponential(peak - shift, F)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    if F.DROPOUT:
        p = tl.where(dropout_keep(first, start, dropout, ROWS, COLUMNS), p, 0.0)
    v = load_rows(values, start, T, v_stride, F.DV, COLUMNS, F.BLOCK_DV, EDGE, F)
    if SAFE:
        v = zero_nonfinite(v)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=F.PRECISION)
    return acc, total, new_peak


@triton.jit
def _fwd_store(out, lse, out_stride, acc, total, peak, first, rows, keep_scale, F: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    if F.DROPOUT:
        inverse = inverse * keep_scale
    store_rows(out, first, rows, out_stride, acc * inverse[:, None], F.DV, ROWS, F.BLOCK_DV, F)
    log_total = tl.log2(tl.where(empty, 1.0, total))
    if F.NATURAL:
        log_sum = peak + log_total * LN2
    else:
        log_sum = (peak + log_total) * LN2
    i = first + tl.arange(0, ROWS)
    tl.store(lse + i, tl.where(empty, float("-inf"), log_sum), mask=i < rows)


@triton.jit
def _fwd_careful(out, lse, out_stride, queries, q_stride, keys, values, k_stride, v_stride, first,
                 ranges, shape, scale, cap, mask, bias, dropout, keep_scale,
                 F: tl.constexpr):  # fmt: skip
    """F.CAREFUL rows again, with NaN and Inf of values brought only to rows that see them."""
    ROWS: tl.constexpr = F.CAREFUL
    COLUMNS: tl.constexpr = F.CAREFUL_N
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    rows = shape[0]
    q = load_rows(queries, first, rows, q_stride, F.D, ROWS, F.BLOCK_D, True, F)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    pieces = (ranges[5] - ranges[0]) * (F.BLOCK_N // COLUMNS)
    for index in tl.range(0, pieces, num_stages=1):
        start = careful_start(index, ranges, F.BLOCK_N, COLUMNS)
        acc, total, peak = _fwd_step(
            acc, total, peak, (q, queries, q_stride), keys, values, start, first, shape, scale, cap,
            mask, bias, 0.0, dropout, k_stride, v_stride, F, True, True, ROWS, COLUMNS)  # fmt: skip
    i = first + tl.arange(0, ROWS)
    for index in tl.range(0, pieces, num_stages=1):
        start = careful_start(index, ranges, F.BLOCK_N, COLUMNS)
        j = start + tl.arange(0, COLUMNS)
        visible, added = tile_visible(i[:, None], j[None, :], shape, mask, F, True)
        v = load_rows(values, start, shape[1], v_stride, F.DV, COLUMNS, F.BLOCK_DV, True, F)
        acc += nonfinite_reaching(visible, v, F)
    _fwd_store(out, lse, out_stride, acc, total, peak, first, rows, keep_scale, F, ROWS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_fwd_kernel(
    out, lse, out_stride, tiles, pairs, section,
    q, k, v, mask, slopes, positions, diagonals, cu_q, cu_k, seed,
    q_stride, k_stride, v_stride, mask_stride, slope_stride, position_stride,
    heads, group, S, T, sequences,
    scale, cap, threshold, keep_scale, left, right, bias_shift, reach,
    F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head against all their keys.

    diagonals [heads, 2 * reach + 1] fp32 is the relative position bias by distance, in the units
    of the logits. Where pairs can be hidden, a program whose sums hold NaN or Inf runs again with
    hidden values kept out of the product, since 0 * NaN is NaN.
    """
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    batch, memory, head, row0, rows, key0, keys, first, _ = place(
        tiles, pairs, heads, section, cu_q, cu_k, sequences, S, T,
        F.BLOCK_M, F.HAS_RIGHT and not F.PACKED, F.PACKED)  # fmt: skip
    if first >= rows:
        return
    offset = 0
    if F.LOWER_RIGHT:
        offset = keys - rows
    shape = (rows, keys, offset, left, right)
    kv_head = head // group
    k_base = head_base(k, k_stride, memory, kv_head, key0)
    v_base = head_base(v, v_stride, memory, kv_head, key0)
    bias, far_lo, far_hi = bias_place(
        slopes, slope_stride, positions, position_stride, diagonals, batch, memory, head,
        sequences, rows, keys, bias_shift, reach, F)  # fmt: skip
    dropout = dropout_place(seed, batch, head, threshold, F)
    low = 0
    high = keys
    masking = (0, 0, 0)
    if F.MASK != "none":
        head_mask = mask + memory * mask_stride[0] + head.to(tl.int64) * mask_stride[1]
        masking = (head_mask, mask_stride[2], mask_stride[3])
        if F.MASK_AXES == "j":
            low, high = visible_keys(head_mask, mask_stride[3], keys, F)
    last = tl.minimum(first + F.BLOCK_M, rows) - 1
    ranges = block_ranges(
        first, last, low, high, keys, offset, left, right, bias[2], reach,
        F.BLOCK_N, F.HAS_LEFT, F.HAS_RIGHT, F.BIAS == "table")  # fmt: skip

    q_base = head_base(q, q_stride, memory, head, row0)
    q_rows = load_rows(
        q_base, first, rows, (q_stride[2], q_stride[3]), F.D, F.BLOCK_M, F.BLOCK_D, True, F
    )
    queries = (q_rows, q_base, (q_stride[2], q_stride[3]))
    kv_strides = (k_stride[2], k_stride[3]), (v_stride[2], v_stride[3])
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for index in range(full_count(ranges)):
        block = full_block(index, ranges)
        far = tl.where(block < ranges[2], far_lo, far_hi)
        acc, total, peak = _fwd_step(
            acc, total, peak, queries, k_base, v_base, block * F.BLOCK_N, first, shape, scale, cap,
            masking, bias, far, dropout, kv_strides[0], kv_strides[1], F, False, False,
            BLOCK_M, F.BLOCK_N)  # fmt: skip
    if F.EDGE:
        for index in range(edge_count(ranges)):
            acc, total, peak = _fwd_step(
                acc, total, peak, queries, k_base, v_base, edge_block(index, ranges) * F.BLOCK_N,
                first, shape, scale, cap, masking, bias, 0.0, dropout, kv_strides[0], kv_strides[1],
                F, True, False, BLOCK_M, F.BLOCK_N)  # fmt: skip
    out_base = head_base(out, out_stride, memory, head, row0)
    lse_base = lse + (memory * heads + head) * S + row0
    out_strides = (out_stride[2], out_stride[3])
    poisoned = False
    if F.HIDES:
        poisoned = any_nonfinite(acc)
    if poisoned:
        for piece in range(0, BLOCK_M, F.CAREFUL):
            _fwd_careful(
                out_base, lse_base, out_strides, q_base, (q_stride[2], q_stride[3]), k_base, v_base,
                kv_strides[0], kv_strides[1], first + piece, ranges, shape, scale, cap, masking,
                bias, dropout, keep_scale, F)  # fmt: skip
    else:
        _fwd_store(
            out_base, lse_base, out_strides, acc, total, peak, first, rows, keep_scale, F, BLOCK_M
        )


def forward_calls(arch, out, lse, q, k, v, *rest):
    """The kernel calls of one forward."""
    plan = Plan.make(arch, q, k, v, *rest, others=(out,))
    B, H, S, _ = q.shape
    tile = plan.tile("fwd")
    tiles = plan.tiles(S, tile.block_m)
    f = plan.features
    features = specialize(
        f,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        EDGE=f.PACKED or f.HAS_LEFT or f.HAS_RIGHT or f.BIAS == "table"
        or k.size(2) % tile.block_n != 0,
    )  # fmt: skip
    pairs = B * H
    head_args = (out, lse, out.stride(), tiles, pairs, plan.section(pairs))
    yield from plan.calls
    yield Call(
        attention_fwd_kernel,
        (tiles * pairs,),
        head_args + plan.shared_args(),
        features,
        tile.num_warps,
        tile.num_stages,
    )


def attention_fwd(out, lse, q, k, v, mask, slopes, positions, table, lut, cu_q, cu_k, seed,
                  scale, softcap, dropout_p, left, right, lower_right, bias_shift):  # fmt: skip
    """Fill out [B, H, S, Dv] and lse [B, H, S] (fp32, natural log, -inf for a row without keys)."""
    for call in forward_calls(
        device_arch(q.device), out, lse, q, k, v, mask, slopes, positions, table, lut, cu_q, cu_k,
        seed, scale, softcap, dropout_p, left, right, lower_right, bias_shift,
    ):  # fmt: skip
        call.run()


def attention_bwd(dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, mask, slopes,
                  positions, table, lut, cu_q, cu_k, seed, scale, softcap, dropout_p, left, right,
                  lower_right, bias_shift, need):  # fmt: skip
    """Fill the gradients asked for by need: dq 1, dk 2, dv 4, dmask 8, dtable 16."""
    for call in backward_calls(
        device_arch(q.device), dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, mask,
        slopes, positions, table, lut, cu_q, cu_k, seed, scale, softcap, dropout_p, left, right,
        lower_right, bias_shift, need,
    ):  # fmt: skip
        call.run()
