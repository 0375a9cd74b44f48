"""Attention's backward in Triton: gradients in a fixed order, in O(S) scratch a head.

    p = exp(logits - lse);  dp = dropout(dout v^T);  ds = p (dp - delta), delta = rowsum(dout out) - dlse
    dq = scale ds k;  dk = scale ds^T q;  dv = dropout(p)^T dout;  dmask, dtable = sums of ds

The rows kernel owns BLOCK_M rows: delta, dq, row sums of ds (a mask without a key axis) and sums
of ds by bucket (the table). The columns kernel owns BLOCK_N keys: dk, dv and column sums of ds (a
mask without a row axis). The mask kernel owns a tile of a mask with both axes. Nothing is added
atomically; what several programs contribute to is written apart and summed after.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .common import (
    LOG2E,
    any_block,
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
    mask_visible,
    nonfinite_reaching,
    place,
    store_rows,
    tile_logits,
    tile_visible,
    visible_keys,
    zero_nonfinite,
)
from .launch import Call
from .plan import Plan

_PLAIN_INTEGERS = [
    "heads", "group", "S", "T", "sequences", "tiles", "pairs", "section", "left", "right",
    "bias_shift", "reach", "threshold", "first_bucket", "column_tiles", "batch_sum", "head_sum",
]  # fmt: skip
# lse rounds to its own magnitude. In fp32, and beyond this magnitude under a float mask (where a
# row may hold one huge number), rows get their sums computed anew, as two numbers.
_LSE_TRUSTED = tl.constexpr(256.0)


@triton.jit
def _row_statistics(shift, log_total, i, rows, F: tl.constexpr):
    """Per row what p = exp(x - shift) / 2^log_total needs, +inf for rows outside."""
    peak = tl.load(shift + i, mask=i < rows, other=float("inf"))
    if F.NATURAL:
        return peak, tl.load(log_total + i, mask=i < rows, other=0.0)
    else:
        return tl.where(peak == float("-inf"), float("inf"), peak * LOG2E), peak


@triton.jit
def _probability(x, peak, log_total, F: tl.constexpr):
    if F.NATURAL:
        return tl.exp2((x - peak) * LOG2E - log_total)
    else:
        return tl.exp2(x - peak)


@triton.jit
def _diagonal_sums(ds, BLOCK: tl.constexpr):
    """Sums of ds [BLOCK, BLOCK] along j - i = c and along j - i = c - BLOCK, for c < BLOCK."""
    i = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    turned = tl.gather(ds, (i + c) % BLOCK, 1)
    upper = tl.sum(tl.where(i + c < BLOCK, turned, 0.0), 0)
    lower = tl.sum(tl.where(i + c < BLOCK, 0.0, turned), 0)
    return upper, lower


@triton.jit
def _bucket_sums(sums, distance, lut, reach, first_bucket, BUCKETS: tl.constexpr):
    """sums [N], each of one distance [N], added up by bucket: [BUCKETS]."""
    at = tl.minimum(tl.maximum(distance, -reach), reach) + reach
    bucket = tl.load(lut + at)
    chosen = bucket[:, None] == first_bucket + tl.arange(0, BUCKETS)[None, :]
    return tl.sum(tl.where(chosen, sums[:, None], 0.0), 0)


@triton.jit
def _rows_step(acc, row_sum, low_sum, high_sum, buckets, q, dout, peak, log_total, delta, keys, values, start, first,
               shape, scale, cap, mask, bias, far_lo, far_hi, is_low, dropout, keep_scale, k_stride,
               v_stride, lut, first_bucket, F: tl.constexpr, EDGE: tl.constexpr, SAFE: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """dq of ROWS rows, and the sums of ds asked for, over COLUMNS more keys.

    Where the table is constant over a block, ds goes by rows to its low or its high end.
    """
    T = shape[1]
    far = 0.0
    if not EDGE:
        far = tl.where(is_low, far_lo, far_hi)
    i = first + tl.arange(0, ROWS)
    j = start + tl.arange(0, COLUMNS)
    k = load_rows(keys, start, T, k_stride, F.D, COLUMNS, F.BLOCK_D, EDGE, F)
    product = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    x, visible, bent = tile_logits(
        product, i[:, None], j[None, :], shape, scale, cap, mask, bias, far, F, EDGE
    )
    p = _probability(x, peak[:, None], log_total[:, None], F)
    v = load_rows(values, start, T, v_stride, F.DV, COLUMNS, F.BLOCK_DV, EDGE, F)
    dp = tl.dot(dout, tl.trans(v), input_precision=F.PRECISION)
    if F.DROPOUT:
        keep = dropout_keep(first, start, dropout, ROWS, COLUMNS)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    HIDES: tl.constexpr = EDGE or F.MASK != "none"
    if HIDES:
        ds = tl.where(visible, ds, 0.0)
    if not SAFE:
        if F.ROW_SUMS:
            row_sum += tl.sum(ds, 1)
        if F.BUCKETS > 0 and not EDGE:
            part = tl.sum(ds, 1)
            low_sum += tl.where(is_low, part, 0.0)
            high_sum += tl.where(is_low, 0.0, part)
        if F.BUCKETS > 0 and EDGE:
            upper, lower = _diagonal_sums(ds, F.BLOCK_N)
            distance = start - first - bias[2] + tl.arange(0, F.BLOCK_N)
            buckets += _bucket_sums(upper, distance, lut, bias[3], first_bucket, F.BUCKETS)
            buckets += _bucket_sums(
                lower, distance - F.BLOCK_N, lut, bias[3], first_bucket, F.BUCKETS
            )
    if F.WRITE_DQ:
        if F.SOFTCAP:
            ds = ds * (1.0 - bent * bent)
            if HIDES:
                ds = tl.where(visible, ds, 0.0)
        if SAFE:
            k = zero_nonfinite(k)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=F.PRECISION)
    return acc, row_sum, low_sum, high_sum, buckets


@triton.jit
def _rows_statistics_anew(q, keys, k_stride, first, ranges, shape, scale, cap, mask, bias,
                          F: tl.constexpr):  # fmt: skip
    """(peak, log2 of the sum relative to it) of BLOCK_M rows: lse in two numbers."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for index in tl.range(0, ranges[5] - ranges[0], num_stages=1):
        start = any_block(index, ranges) * F.BLOCK_N
        j = start + tl.arange(0, F.BLOCK_N)
        k = load_rows(keys, start, shape[1], k_stride, F.D, F.BLOCK_N, F.BLOCK_D, True, F)
        product = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
        x, _, _ = tile_logits(
            product, i[:, None], j[None, :], shape, scale, cap, mask, bias, 0.0, F, True
        )
        new_peak = tl.maximum(peak, tl.max(x, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * exponential(peak - base, F) + tl.sum(exponential(x - base[:, None], F), 1)
        peak = new_peak
    return peak, tl.where(total == 0.0, 0.0, tl.log2(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _rows_careful(dq, dq_stride, queries, q_stride, douts, dout_stride, peaks, log_totals, deltas,
                  keys, values, k_stride, v_stride, first, ranges, shape, scale, cap, mask, bias,
                  dropout, keep_scale, lut, grad_scale, F: tl.constexpr):  # fmt: skip
    """dq of F.CAREFUL rows again, with NaN and Inf of keys kept out of the product.

    A visible key with NaN has made ds NaN already.
    """
    ROWS: tl.constexpr = F.CAREFUL
    COLUMNS: tl.constexpr = F.CAREFUL_N
    BLOCK_D: tl.constexpr = F.BLOCK_D
    rows = shape[0]
    i = first + tl.arange(0, ROWS)
    q = load_rows(queries, first, rows, q_stride, F.D, ROWS, F.BLOCK_D, True, F)
    dout = load_rows(douts, first, rows, dout_stride, F.DV, ROWS, F.BLOCK_DV, True, F)
    peak, log_total = _row_statistics(peaks, log_totals, i, rows, F)
    delta = tl.load(deltas + i, mask=i < rows, other=0.0)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    pieces = (ranges[5] - ranges[0]) * (F.BLOCK_N // COLUMNS)
    for index in tl.range(0, pieces, num_stages=1):
        start = careful_start(index, ranges, F.BLOCK_N, COLUMNS)
        acc, _, _, _, _ = _rows_step(
            acc, 0.0, 0.0, 0.0, 0.0, q, dout, peak, log_total, delta, keys, values, start, first,
            shape, scale, cap, mask, bias, 0.0, 0.0, True, dropout, keep_scale, k_stride, v_stride,
            lut, 0, F, True, True, ROWS, COLUMNS)  # fmt: skip
    store_rows(dq, first, rows, dq_stride, acc * grad_scale, F.D, ROWS, F.BLOCK_D, F)


@triton.jit(do_not_specialize=_PLAIN_INTEGERS)
def attention_bwd_rows_kernel(
    dq, row_sums, bucket_sums, delta, shift, log_total, dout, dlse, out, lse, lut,
    dq_stride, dout_stride, dlse_stride, out_stride,
    tiles, pairs, section, first_bucket, grad_scale,
    q, k, v, mask, slopes, positions, diagonals, cu_q, cu_k, seed,
    q_stride, k_stride, v_stride, mask_stride, slope_stride, position_stride,
    heads, group, S, T, sequences,
    scale, cap, threshold, keep_scale, left, right, bias_shift, reach,
    F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head against all their keys.

    Writes delta [B, H, S] and, with NATURAL, shift and log_total [B, H, S] for the other kernels
    (else both are lse, and log_total is not used).
    """
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_D: tl.constexpr = F.BLOCK_D
    batch, memory, head, row0, rows, key0, keys, first, slot = place(
        tiles, pairs, heads, section, cu_q, cu_k, sequences, S, T,
        F.BLOCK_M, F.HAS_RIGHT and not F.PACKED, F.PACKED)  # fmt: skip
    if first >= rows:
        return
    i = first + tl.arange(0, BLOCK_M)
    dout_base = head_base(dout, dout_stride, memory, head, row0)
    dout_strides = (dout_stride[2], dout_stride[3])
    dout_rows = load_rows(
        dout_base, first, rows, dout_strides, F.DV, F.BLOCK_M, F.BLOCK_DV, True, F
    )
    out_rows = load_rows(
        head_base(out, out_stride, memory, head, row0), first, rows, (out_stride[2], out_stride[3]),
        F.DV, F.BLOCK_M, F.BLOCK_DV, True, F)  # fmt: skip
    delta_rows = tl.sum(dout_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    if dlse is not None:
        dlse_rows = head_base(dlse, dlse_stride, memory, head, row0)
        delta_rows -= tl.load(
            dlse_rows + i.to(tl.int64) * dlse_stride[2], mask=i < rows, other=0.0
        ).to(tl.float32)
    at = (memory * heads + head) * S + row0
    tl.store(delta + at + i, delta_rows, mask=i < rows)

    offset = 0
    if F.LOWER_RIGHT:
        offset = keys - rows
    shape = (rows, keys, offset, left, right)
    kv_head = head // group
    k_base = head_base(k, k_stride, memory, kv_head, key0)
    v_base = head_base(v, v_stride, memory, kv_head, key0)
    k_strides = (k_stride[2], k_stride[3])
    v_strides = (v_stride[2], v_stride[3])
    bias, far_lo, far_hi = bias_place(
        slopes, slope_stride, positions, position_stride, diagonals, batch, memory, head,
        sequences, rows, keys, bias_shift, reach, F)  # fmt: skip
    dropout = dropout_place(seed, batch, head, threshold, F)
    low = 0
    high = keys
    masking = (None, 0, 0)
    if F.MASK != "none":
        head_mask = mask + memory * mask_stride[0] + head.to(tl.int64) * mask_stride[1]
        masking = (head_mask, mask_stride[2], mask_stride[3])
        if F.MASK_AXES == "j":
            low, high = visible_keys(head_mask, mask_stride[3], keys, F)
    last = tl.minimum(first + BLOCK_M, rows) - 1
    ranges = block_ranges(
        first, last, low, high, keys, offset, left, right, bias[2], reach,
        F.BLOCK_N, F.HAS_LEFT, F.HAS_RIGHT, F.BIAS == "table")  # fmt: skip
    q_base = head_base(q, q_stride, memory, head, row0)
    q_strides = (q_stride[2], q_stride[3])
    q_rows = load_rows(q_base, first, rows, q_strides, F.D, F.BLOCK_M, F.BLOCK_D, True, F)

    if F.NATURAL:
        peak = tl.load(lse + at + i, mask=i < rows, other=float("-inf"))
        log_sum = tl.zeros([BLOCK_M], tl.float32)
        unsure = tl.abs(peak) < float("inf")
        if q.dtype.element_ty != tl.float32:
            unsure = unsure & (tl.abs(peak) > _LSE_TRUSTED)
        if tl.max(tl.where(unsure, 1, 0), 0) > 0:
            peak, log_sum = _rows_statistics_anew(
                q_rows, k_base, k_strides, first, ranges, shape, scale, cap, masking, bias, F
            )
        peak = tl.where(peak == float("-inf"), float("inf"), peak)
        tl.store(shift + at + i, peak, mask=i < rows)
        tl.store(log_total + at + i, log_sum, mask=i < rows)
    else:
        peak, log_sum = _row_statistics(lse + at, lse + at, i, rows, F)

    if F.WRITE_DQ or F.ROW_SUMS or F.BUCKETS > 0:
        BUCKETS: tl.constexpr = max(F.BUCKETS, 1)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        low_sum = tl.zeros([BLOCK_M], tl.float32)
        high_sum = tl.zeros([BLOCK_M], tl.float32)
        buckets = tl.zeros([BUCKETS], tl.float32)
        for index in range(0, full_count(ranges)):
            block = full_block(index, ranges)
            acc, row_sum, low_sum, high_sum, buckets = _rows_step(
                acc, row_sum, low_sum, high_sum, buckets, q_rows, dout_rows, peak, log_sum,
                delta_rows, k_base, v_base, block * F.BLOCK_N, first, shape, scale, cap, masking, bias, far_lo,
                far_hi, block < ranges[2], dropout, keep_scale, k_strides, v_strides, lut,
                first_bucket, F, False, False, BLOCK_M, F.BLOCK_N)  # fmt: skip
        if F.EDGE:
            for index in range(0, edge_count(ranges)):
                acc, row_sum, low_sum, high_sum, buckets = _rows_step(
                    acc, row_sum, low_sum, high_sum, buckets, q_rows, dout_rows, peak, log_sum,
                    delta_rows, k_base, v_base, edge_block(index, ranges) * F.BLOCK_N, first, shape,
                    scale, cap, masking, bias, 0.0, 0.0, True, dropout, keep_scale, k_strides, v_strides, lut,
                    first_bucket, F, True, False, BLOCK_M, F.BLOCK_N)  # fmt: skip
        if F.ROW_SUMS:
            tl.store(row_sums + at + i, row_sum, mask=i < rows)
        if F.BUCKETS > 0:
            number = tl.arange(0, BUCKETS)
            low_bucket = tl.load(lut) - first_bucket
            high_bucket = tl.load(lut + 2 * reach) - first_bucket
            buckets += tl.where(number == low_bucket, tl.sum(low_sum, 0), 0.0)
            buckets += tl.where(number == high_bucket, tl.sum(high_sum, 0), 0.0)
            tl.store(bucket_sums + slot * BUCKETS + number, buckets)
        if F.WRITE_DQ:
            dq_base = head_base(dq, dq_stride, memory, head, row0)
            dq_strides = (dq_stride[2], dq_stride[3])
            poisoned = False
            if F.HIDES:
                poisoned = any_nonfinite(acc)
            if poisoned:
                for piece in range(0, BLOCK_M, F.CAREFUL):
                    _rows_careful(
                        dq_base, dq_strides, q_base, q_strides, dout_base, dout_strides,
                        shift + at, log_total + at, delta + at, k_base, v_base, k_strides,
                        v_strides, first + piece, ranges, shape, scale, cap, masking, bias, dropout,
                        keep_scale, lut, grad_scale, F)  # fmt: skip
            else:
                store_rows(
                    dq_base, first, rows, dq_strides, acc * grad_scale, F.D, F.BLOCK_M, F.BLOCK_D,
                    F)  # fmt: skip


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
    product = tl.dot(k, tl.trans(q), input_precision=F.PRECISION)
    x, visible, bent = tile_logits(
        product, i[None, :], j[:, None], shape, scale, cap, mask, bias, far, F, EDGE
    )
    peak, log_total = _row_statistics(peaks, log_totals, i, S, F)
    p = _probability(x, peak[None, :], log_total[None, :], F)
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
    masking = (None, 0, 0)
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
    acc_k = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    acc_v = tl.zeros([COLUMNS, BLOCK_DV], tl.float32)
    unsummed = tl.zeros([COLUMNS], tl.float32)
    j = first + tl.arange(0, COLUMNS)
    pieces = (ranges[5] - ranges[0]) * (F.BLOCK_M // ROWS)
    q_strides = (q_stride[2], q_stride[3])
    dout_strides = (dout_stride[2], dout_stride[3])
    for member in range(0, group):
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
                acc_k, acc_v, unsummed, k, v, queries, douts, shift + at, log_total + at, delta + at,
                start, first, shape, scale, cap, masking, bias, 0.0, dropout,
                keep_scale, q_strides, dout_strides, F, True, True, COLUMNS, ROWS)  # fmt: skip
        if F.WRITE_DV:
            for index in tl.range(0, pieces, num_stages=1):
                start = careful_start(index, ranges, F.BLOCK_M, ROWS)
                i = start + tl.arange(0, ROWS)
                visible, added = tile_visible(i[None, :], j[:, None], shape, masking, F, True)
                seen = load_rows(
                    douts, start, rows, dout_strides, F.DV, ROWS, F.BLOCK_DV, True, F
                )
                acc_v += nonfinite_reaching(visible, seen, F)
    if F.WRITE_DK:
        store_rows(dk, first, keys, dk_stride, acc_k * grad_scale, F.D, COLUMNS, F.BLOCK_D, F)
    if F.WRITE_DV:
        store_rows(dv, first, keys, dv_stride, acc_v, F.DV, COLUMNS, F.BLOCK_DV, F)


@triton.jit(do_not_specialize=_PLAIN_INTEGERS)
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
    k_rows = load_rows(k_base, first, keys, k_strides, F.D, F.BLOCK_N, F.BLOCK_D, True, F)
    v_rows = load_rows(v_base, first, keys, v_strides, F.DV, F.BLOCK_N, F.BLOCK_DV, True, F)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        at, masking, bias, far_lo, far_hi, dropout, shown = _column_head(
            head, batch, memory, row0, rows, keys, S, heads, first, F.BLOCK_N, mask, mask_stride,
            slopes, slope_stride, positions, position_stride, diagonals, sequences, bias_shift,
            reach, seed, threshold, F)  # fmt: skip
        queries = head_base(q, q_stride, memory, head, row0)
        douts = head_base(dout, dout_stride, memory, head, row0)
        column_sum = tl.zeros([BLOCK_N], tl.float32)
        for index in range(0, full_count(ranges) * shown):
            block = full_block(index, ranges)
            far = tl.where(block < ranges[2], far_hi, far_lo)
            acc_k, acc_v, column_sum = _columns_step(
                acc_k, acc_v, column_sum, k_rows, v_rows, queries, douts, shift + at,
                log_total + at, delta + at, block * F.BLOCK_M, first, shape, scale, cap,
                masking, bias, far, dropout, keep_scale, q_strides, dout_strides, F, False, False,
                BLOCK_N, F.BLOCK_M)  # fmt: skip
        if F.EDGE:
            for index in range(0, edge_count(ranges) * shown):
                acc_k, acc_v, column_sum = _columns_step(
                    acc_k, acc_v, column_sum, k_rows, v_rows, queries, douts, shift + at,
                    log_total + at, delta + at, edge_block(index, ranges) * F.BLOCK_M, first,
                    shape, scale, cap, masking, bias, 0.0, dropout, keep_scale, q_strides,
                    dout_strides, F, True, False, BLOCK_N, F.BLOCK_M)  # fmt: skip
        if F.COLUMN_SUMS:
            j = first + tl.arange(0, BLOCK_N)
            tl.store(column_sums + (memory * heads + head) * T + key0 + j, column_sum, mask=j < keys)

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


@triton.jit(do_not_specialize=_PLAIN_INTEGERS)
def attention_bwd_mask_kernel(
    dmask, delta, shift, log_total, dout, dmask_stride, dout_stride,
    tiles, column_tiles, kept_heads, batch_sum, head_sum,
    q, k, v, mask, slopes, positions, diagonals, cu_q, cu_k, seed,
    q_stride, k_stride, v_stride, mask_stride, slope_stride, position_stride,
    heads, group, S, T, sequences,
    scale, cap, threshold, keep_scale, left, right, bias_shift, reach,
    F: tl.constexpr,
):  # fmt: skip
    """One program: one tile of dmask, summed over the batch_sum x head_sum pairs that share it."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    program = tl.program_id(0)
    tile = program % tiles
    owner = program // tiles
    first_row = (tile // column_tiles) * F.BLOCK_M
    first_key = (tile % column_tiles) * F.BLOCK_N
    i = first_row + tl.arange(0, BLOCK_M)
    j = first_key + tl.arange(0, BLOCK_N)
    offset = 0
    if F.LOWER_RIGHT:
        offset = T - S
    shape = (S, T, offset, left, right)
    met = 1
    if F.HAS_LEFT:
        met = tl.where(first_row + offset - left < first_key + BLOCK_N, met, 0)
    if F.HAS_RIGHT:
        met = tl.where(first_row + BLOCK_M - 1 + offset + right >= first_key, met, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(0, batch_sum * head_sum * met):
        batch = owner // kept_heads + number // head_sum
        head = owner % kept_heads + number % head_sum
        memory = batch.to(tl.int64)
        kv_head = head // group
        bias, far_lo, far_hi = bias_place(
            slopes, slope_stride, positions, position_stride, diagonals, batch, memory, head,
            sequences, S, T, bias_shift, reach, F)  # fmt: skip
        dropout = dropout_place(seed, batch, head, threshold, F)
        head_mask = mask + memory * mask_stride[0] + head.to(tl.int64) * mask_stride[1]
        masking = (head_mask, mask_stride[2], mask_stride[3])
        q_rows = load_rows(
            head_base(q, q_stride, memory, head, 0), first_row, S, (q_stride[2], q_stride[3]),
            F.D, BLOCK_M, F.BLOCK_D, True, F)  # fmt: skip
        k_rows = load_rows(
            head_base(k, k_stride, memory, kv_head, 0), first_key, T, (k_stride[2], k_stride[3]),
            F.D, BLOCK_N, F.BLOCK_D, True, F)  # fmt: skip
        product = tl.dot(q_rows, tl.trans(k_rows), input_precision=F.PRECISION)
        x, visible, bent = tile_logits(
            product, i[:, None], j[None, :], shape, scale, cap, masking, bias, 0.0, F, True
        )
        at = (memory * heads + head) * S
        peak, log_sum = _row_statistics(shift + at, log_total + at, i, S, F)
        p = _probability(x, peak[:, None], log_sum[:, None], F)
        dout_rows = load_rows(
            head_base(dout, dout_stride, memory, head, 0), first_row, S,
            (dout_stride[2], dout_stride[3]), F.DV, BLOCK_M, F.BLOCK_DV, True, F)  # fmt: skip
        v_rows = load_rows(
            head_base(v, v_stride, memory, kv_head, 0), first_key, T, (v_stride[2], v_stride[3]),
            F.DV, BLOCK_N, F.BLOCK_DV, True, F)  # fmt: skip
        dp = tl.dot(dout_rows, tl.trans(v_rows), input_precision=F.PRECISION)
        if F.DROPOUT:
            keep = dropout_keep(first_row, first_key, dropout, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        delta_rows = tl.load(delta + at + i, mask=i < S, other=0.0)
        acc += tl.where(visible, p * (dp - delta_rows[:, None]), 0.0)
    base = dmask + (owner // kept_heads).to(tl.int64) * dmask_stride[0]
    base += (owner % kept_heads).to(tl.int64) * dmask_stride[1]
    place_of = i.to(tl.int64)[:, None] * dmask_stride[2] + j[None, :] * dmask_stride[3]
    inside = (i < S)[:, None] & (j < T)[None, :]
    tl.store(base + place_of, acc.to(dmask.dtype.element_ty), mask=inside)


def backward_calls(arch, dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, *rest):
    """The kernel calls of one backward, and between them the sums over what they wrote apart."""
    *inputs, need = rest
    mask, scale = inputs[0], inputs[8]
    plan = Plan.make(arch, q, k, v, *inputs, others=(out, dout, dq, dk, dv))
    (B, H, S, _), (G, T) = q.shape, k.shape[1:3]
    want_dq, want_dk, want_dv, want_mask, want_table = (bool(need & bit) for bit in (1, 2, 4, 8, 16))
    both_axes = want_mask and mask.size(2) > 1 and mask.size(3) > 1
    row_sums = want_mask and not both_axes and plan.features.MASK_AXES == "i"
    column_sums = want_mask and not both_axes and not row_sums
    f = replace(
        plan.features, WRITE_DQ=want_dq, WRITE_DK=want_dk, WRITE_DV=want_dv,
        ROW_SUMS=row_sums, COLUMN_SUMS=column_sums,
    )  # fmt: skip
    uneven = f.PACKED or f.HAS_LEFT or f.HAS_RIGHT or f.BIAS == "table"

    def scratch(*shape):
        return torch.empty(*shape, dtype=torch.float32, device=q.device)

    delta = scratch(B, H, S)
    shift, log_total = (scratch(B, H, S), scratch(B, H, S)) if f.NATURAL else (lse, lse)
    row_part = scratch(B, H, S) if row_sums else None
    column_part = torch.zeros_like(scratch(B, H, T)) if column_sums else None
    dlse_stride = (0, 0, 0) if dlse is None else dlse.stride()
    yield from plan.calls

    def rows_call(features, tile, bucket_part, first_bucket, lut):
        tiles = plan.tiles(S, tile.block_m)
        return Call(
            attention_bwd_rows_kernel,
            (tiles * B * H,),
            (dq, row_part, bucket_part, delta, shift, log_total, dout, dlse, out, lse, lut,
             dq.stride() if want_dq else (0, 0, 0, 0), dout.stride(), dlse_stride, out.stride(),
             tiles, B * H, plan.section(B * H), first_bucket, scale, *plan.shared_args()),
            replace(
                features, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                EDGE=uneven or T % tile.block_n != 0,
            ),
            tile.num_warps,
            tile.num_stages,
        )  # fmt: skip

    if not want_table:
        yield rows_call(f, plan.tile("rows"), None, 0, None)
    else:
        lut, buckets = inputs[4].contiguous(), dtable.size(0)
        tile = plan.tile("rows_table")
        tiles = plan.tiles(S, tile.block_m)
        width = min(64, triton.next_power_of_2(max(buckets, 1)))
        for first in range(0, buckets, width):
            part = torch.zeros_like(scratch(B * H, tiles, width))
            features = replace(
                f, BUCKETS=width, WRITE_DQ=want_dq and first == 0, ROW_SUMS=row_sums and first == 0
            )
            yield rows_call(features, tile, part, first, lut)
            summed = part.view(B, H, tiles, width).sum((0, 2))
            dtable[first : first + width].copy_(summed.t()[: buckets - first])

    if want_dk or want_dv or column_sums:
        tile = plan.tile("columns")
        tiles = plan.tiles(T, tile.block_n)
        yield Call(
            attention_bwd_columns_kernel,
            (tiles * B * G,),
            (dk, dv, column_part, delta, shift, log_total, dout,
             dk.stride() if want_dk else (0, 0, 0, 0), dv.stride() if want_dv else (0, 0, 0, 0),
             dout.stride(), tiles, B * G, plan.section(B * G), scale, *plan.shared_args()),
            replace(
                f, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                EDGE=uneven or S % tile.block_m != 0,
            ),
            tile.num_warps,
            tile.num_stages,
        )  # fmt: skip

    if both_axes:
        tile = plan.tile("mask")
        column_tiles = -(-T // tile.block_n)
        tiles = -(-S // tile.block_m) * column_tiles
        kept_batches, kept_heads = mask.size(0), mask.size(1)
        yield Call(
            attention_bwd_mask_kernel,
            (tiles * kept_batches * kept_heads,),
            (dmask, delta, shift, log_total, dout, dmask.stride(), dout.stride(),
             tiles, column_tiles, kept_heads, B // kept_batches if kept_batches else 0,
             H // kept_heads, *plan.shared_args()),
            replace(f, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EDGE=True),
            tile.num_warps,
            tile.num_stages,
        )  # fmt: skip
    elif want_mask:
        part = row_part[..., None] if row_sums else column_part[:, :, None, :]
        summed = [d for d in range(4) if mask.size(d) == 1 and part.size(d) != 1]
        dmask.copy_(part.sum(summed, keepdim=True) if summed else part)
