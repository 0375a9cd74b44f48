"""The columns kernel of attention's backward: dk, dv and column sums of ds."""

import triton
import triton.language as tl

from .common import (
    any_nonfinite,
    bias_place,
    block_ranges,
    careful_start,
    dropout_keep,
    dropout_place,
    edge_block,
    edge_count,
    full_block,
    full_count,
    head_base,
    load_rows,
    mask_visible,
    nonfinite_reaching,
    operand,
    place,
    probability,
    row_statistics,
    store_rows,
    tile_logits,
    tile_visible,
    zero_nonfinite,
)
from .launch import UNSPECIALIZED


@triton.jit
def _columns_step(dk, dv, column_sum, k, v, queries, douts, peaks, log_totals, deltas, start, first,
                  shape, scale, cap, mask, bias, far, dropout, keep_scale, q_stride, dout_stride,
                  F: tl.constexpr, EDGE: tl.constexpr, SAFE: tl.constexpr,
                  COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """dk and dv of COLUMNS keys over ROWS more rows; tiles are [keys, rows]."""
    S = shape[0]
    i = start + tl.arange(0, ROWS)
    j = first + tl.arange(0, COLUMNS)
    q = load_rows(queries, start, S, q_stride, F.D, ROWS, F.BLOCK_D, EDGE, F)
    RELOAD: tl.constexpr = F.FP32 and F.BLOCK_N == 16  # smaller tiles are for want of registers
    k = operand(k, first, start, shape[1], F.D, COLUMNS, F.BLOCK_D, F, RELOAD)
    product = tl.dot(k, tl.trans(q), input_precision=F.PRECISION)
    x, visible, bent = tile_logits(
        product, i[None, :], j[:, None], shape, scale, cap, mask, bias, far, F, EDGE
    )
    peak, log_total = row_statistics(peaks, log_totals, i, S, F)
    p = probability(x, peak[None, :], log_total[None, :], F)
    HIDES: tl.constexpr = EDGE or F.MASK != "none"
    if HIDES:
        p = tl.where(visible, p, 0.0)
    dout = load_rows(douts, start, S, dout_stride, F.DV, ROWS, F.BLOCK_DV, EDGE, F)
    if F.DROPOUT:
        keep = dropout_keep(start, first, dropout, ROWS, COLUMNS)
        keep = tl.trans(keep.to(tl.int8)) != 0
    if F.WRITE_DV:
        dropped = p
        if F.DROPOUT:
            dropped = tl.where(keep, p * keep_scale, 0.0)
        seen = dout
        if SAFE:
            seen = zero_nonfinite(dout)
        dv = tl.dot(dropped.to(seen.dtype), seen, dv, input_precision=F.PRECISION)
    if F.WRITE_DK or F.COLUMN_SUMS:
        v = operand(v, first, start, shape[1], F.DV, COLUMNS, F.BLOCK_DV, F, RELOAD)
        dp = tl.dot(v, tl.trans(dout), input_precision=F.PRECISION)
        if F.DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        delta = tl.load(deltas + i, mask=i < S, other=0.0)
        ds = p * (dp - delta[None, :])
        if HIDES:
            ds = tl.where(visible, ds, 0.0)
        if F.COLUMN_SUMS and not SAFE:
            column_sum += tl.sum(ds, 1)
        if F.WRITE_DK:
            if F.SOFTCAP:
                ds = ds * (1.0 - bent * bent)
                if HIDES:
                    ds = tl.where(visible, ds, 0.0)
            if SAFE:
                q = zero_nonfinite(q)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=F.PRECISION)
    return dk, dv, column_sum


@triton.jit
def _column_head(head, batch, memory, row0, rows, keys, S, heads, first, COLUMNS: tl.constexpr,
                 mask, mask_stride, slopes, slope_stride, positions, position_stride, diagonals,
                 sequences, bias_shift, reach, seed, threshold,
                 F: tl.constexpr):  # fmt: skip
    """What one query head of the group needs: statistics' place, mask, bias, dropout, shown."""
    at = (memory * heads + head) * S + row0
    bias, far_lo, far_hi = bias_place(
        slopes, slope_stride, positions, position_stride, diagonals, batch, memory, head,
        sequences, rows, keys, bias_shift, reach, F)  # fmt: skip
    masking = (0, 0, 0)
    shown = 1
    if F.MASK != "none":
        head_mask = mask + memory * mask_stride[0] + head.to(tl.int64) * mask_stride[1]
        masking = (head_mask, mask_stride[2], mask_stride[3])
        if F.MASK_AXES == "j":
            j = first + tl.arange(0, COLUMNS)
            value = tl.load(head_mask + j.to(tl.int64) * mask_stride[3], mask=j < keys, other=0)
            shown = tl.max(tl.where(mask_visible(value, F) & (j < keys), 1, 0), 0)
    dropout = dropout_place(seed, batch, head, threshold, F)
    return at, masking, bias, far_lo, far_hi, dropout, shown


@triton.jit
def _columns_careful(dk, dv, dk_stride, dv_stride, k_base, v_base, k_stride, v_stride, q, dout,
                     q_stride, dout_stride, shift, log_total, delta, mask, mask_stride, slopes,
                     slope_stride, positions, position_stride, diagonals, sequences, bias_shift,
                     reach, seed, threshold, batch, memory, kv_head, heads, group, S, row0, first,
                     ranges, shape, scale, cap, keep_scale, grad_scale,
                     F: tl.constexpr):  # fmt: skip
    """dk and dv of F.CAREFUL keys again: NaN and Inf of dout reach only keys its row sees."""
    COLUMNS: tl.constexpr = F.CAREFUL
    ROWS: tl.constexpr = F.CAREFUL_M
    BLOCK_D: tl.constexpr = F.BLOCK_D
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    rows, keys, offset, left, right = shape
    k = load_rows(k_base, first, keys, k_stride, F.D, COLUMNS, F.BLOCK_D, True, F)
    v = load_rows(v_base, first, keys, v_stride, F.DV, COLUMNS, F.BLOCK_DV, True, F)
    k_rows = (k, k_base, k_stride)
    v_rows = (v, v_base, v_stride)
    acc_k = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    acc_v = tl.zeros([COLUMNS, BLOCK_DV], tl.float32)
    unsummed = tl.zeros([COLUMNS], tl.float32)
    j = first + tl.arange(0, COLUMNS)
    pieces = (ranges[5] - ranges[0]) * (F.BLOCK_M // ROWS)
    q_strides = (q_stride[2], q_stride[3])
    dout_strides = (dout_stride[2], dout_stride[3])
    for member in range(group):
        head = kv_head * group + member
        at, masking, bias, far_lo, far_hi, dropout, shown = _column_head(
            head, batch, memory, row0, rows, keys, S, heads, first, COLUMNS, mask, mask_stride,
            slopes, slope_stride, positions, position_stride, diagonals, sequences, bias_shift,
            reach, seed, threshold, F)  # fmt: skip
        queries = head_base(q, q_stride, memory, head, row0)
        douts = head_base(dout, dout_stride, memory, head, row0)
        for index in tl.range(0, pieces, num_stages=1):
            start = careful_start(index, ranges, F.BLOCK_M, ROWS)
            acc_k, acc_v, unsummed = _columns_step(
                acc_k, acc_v, unsummed, k_rows, v_rows, queries, douts, shift + at, log_total + at,
                delta + at, start, first, shape, scale, cap, masking, bias, 0.0, dropout,
                keep_scale, q_strides, dout_strides, F, True, True, COLUMNS, ROWS)  # fmt: skip
        if F.WRITE_DV:
            for index in tl.range(0, pieces, num_stages=1):
                start = careful_start(index, ranges, F.BLOCK_M, ROWS)
                i = start + tl.arange(0, ROWS)
                visible, added = tile_visible(i[None, :], j[:, None], shape, masking, F, True)
                seen = load_rows(douts, start, rows, dout_strides, F.DV, ROWS, F.BLOCK_DV, True, F)
                acc_v += nonfinite_reaching(visible, seen, F)
    if F.WRITE_DK:
        store_rows(dk, first, keys, dk_stride, acc_k * grad_scale, F.D, COLUMNS, F.BLOCK_D, F)
    if F.WRITE_DV:
        store_rows(dv, first, keys, dv_stride, acc_v, F.DV, COLUMNS, F.BLOCK_DV, F)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_columns_kernel(
    dk, dv, column_sums, delta, shift, log_total, dout, dk_stride, dv_stride, dout_stride,
    tiles, pairs, section, grad_scale,
    q, k, v, mask, slopes, positions, diagonals, cu_q, cu_k, seed,
    q_stride, k_stride, v_stride, mask_stride, slope_stride, position_stride,
    heads, group, S, T, sequences,
    scale, cap, threshold, keep_scale, left, right, bias_shift, reach,
    F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key head against all rows of its query heads, in order.

    column_sums is [B, H, T] fp32.
    """
    BLOCK_N: tl.constexpr = F.BLOCK_N
    BLOCK_D: tl.constexpr = F.BLOCK_D
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    batch, memory, kv_head, key0, keys, row0, rows, first, _ = place(
        tiles, pairs, heads // group, section, cu_k, cu_q, sequences, T, S,
        F.BLOCK_N, False, F.PACKED)  # fmt: skip
    if first >= keys:
        return
    offset = 0
    if F.LOWER_RIGHT:
        offset = keys - rows
    shape = (rows, keys, offset, left, right)
    last = tl.minimum(first + BLOCK_N, keys) - 1
    ranges = block_ranges(
        first, last, 0, rows, rows, -offset, right, left, rows - keys - bias_shift, reach,
        F.BLOCK_M, F.HAS_RIGHT, F.HAS_LEFT, F.BIAS == "table")  # fmt: skip
    k_base = head_base(k, k_stride, memory, kv_head, key0)
    v_base = head_base(v, v_stride, memory, kv_head, key0)
    k_strides = (k_stride[2], k_stride[3])
    v_strides = (v_stride[2], v_stride[3])
    q_strides = (q_stride[2], q_stride[3])
    dout_strides = (dout_stride[2], dout_stride[3])
    k_tile = load_rows(k_base, first, keys, k_strides, F.D, F.BLOCK_N, F.BLOCK_D, True, F)
    v_tile = load_rows(v_base, first, keys, v_strides, F.DV, F.BLOCK_N, F.BLOCK_DV, True, F)
    k_rows = (k_tile, k_base, k_strides)
    v_rows = (v_tile, v_base, v_strides)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        at, masking, bias, far_lo, far_hi, dropout, shown = _column_head(
            head, batch, memory, row0, rows, keys, S, heads, first, F.BLOCK_N, mask, mask_stride,
            slopes, slope_stride, positions, position_stride, diagonals, sequences, bias_shift,
            reach, seed, threshold, F)  # fmt: skip
        queries = head_base(q, q_stride, memory, head, row0)
        douts = head_base(dout, dout_stride, memory, head, row0)
        column_sum = tl.zeros([BLOCK_N], tl.float32)
        for index in range(full_count(ranges) * shown):
            block = full_block(index, ranges)
            far = tl.where(block < ranges[2], far_hi, far_lo)
            acc_k, acc_v, column_sum = _columns_step(
                acc_k, acc_v, column_sum, k_rows, v_rows, queries, douts, shift + at,
                log_total + at, delta + at, block * F.BLOCK_M, first, shape, scale, cap,
                masking, bias, far, dropout, keep_scale, q_strides, dout_strides, F, False, False,
                BLOCK_N, F.BLOCK_M)  # fmt: skip
        if F.EDGE:
            for index in range(edge_count(ranges) * shown):
                acc_k, acc_v, column_sum = _columns_step(
                    acc_k, acc_v, column_sum, k_rows, v_rows, queries, douts, shift + at,
                    log_total + at, delta + at, edge_block(index, ranges) * F.BLOCK_M, first,
                    shape, scale, cap, masking, bias, 0.0, dropout, keep_scale, q_strides,
                    dout_strides, F, True, False, BLOCK_N, F.BLOCK_M)  # fmt: skip
        if F.COLUMN_SUMS:
            j = first + tl.arange(0, BLOCK_N)
            tl.store(
                column_sums + (memory * heads + head) * T + key0 + j, column_sum, mask=j < keys
            )

    dk_base = head_base(dk, dk_stride, memory, kv_head, key0)
    dv_base = head_base(dv, dv_stride, memory, kv_head, key0)
    dk_strides = (dk_stride[2], dk_stride[3])
    dv_strides = (dv_stride[2], dv_stride[3])
    poisoned = False
    if F.HIDES:
        if F.WRITE_DK:
            poisoned = any_nonfinite(acc_k)
        if F.WRITE_DV:
            poisoned = poisoned | any_nonfinite(acc_v)
    if poisoned:
        for piece in range(0, BLOCK_N, F.CAREFUL):
            _columns_careful(
                dk_base, dv_base, dk_strides, dv_strides, k_base, v_base, k_strides, v_strides, q,
                dout, q_stride, dout_stride, shift, log_total, delta, mask, mask_stride, slopes,
                slope_stride, positions, position_stride, diagonals, sequences, bias_shift, reach,
                seed, threshold, batch, memory, kv_head, heads, group, S, row0, first + piece,
                ranges, shape, scale, cap, keep_scale, grad_scale, F)  # fmt: skip
    else:
        if F.WRITE_DK:
            store_rows(
                dk_base, first, keys, dk_strides, acc_k * grad_scale, F.D, BLOCK_N, BLOCK_D, F
            )
        if F.WRITE_DV:
            store_rows(dv_base, first, keys, dv_strides, acc_v, F.DV, BLOCK_N, BLOCK_DV, F)
