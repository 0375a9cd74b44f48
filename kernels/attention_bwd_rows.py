"""The rows kernel of attention's backward: dq, row sums of ds, and sums of ds by bucket."""

import triton
import triton.language as tl

from .common import (
    LSE_TRUSTED,
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
    operand,
    place,
    probability,
    row_statistics,
    store_rows,
    tile_logits,
    visible_keys,
    zero_nonfinite,
)
from .launch import UNSPECIALIZED


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
def _rows_step(acc, row_sum, low_sum, high_sum, buckets, q, dout, peak, log_total, delta, keys,
               values, start, first, shape, scale, cap, mask, bias, far_lo, far_hi, is_low, dropout,
               keep_scale, k_stride, v_stride, lut, first_bucket, F: tl.constexpr,
               EDGE: tl.constexpr, SAFE: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
    """dq of ROWS rows, and the sums of ds asked for, over COLUMNS more keys.

    Where the table is constant over a block, ds goes by rows to its low or its high end.
    """
    T = shape[1]
    far = 0.0
    if not EDGE:
        far = tl.where(is_low, far_lo, far_hi)
    i = first + tl.arange(0, ROWS)
    j = start + tl.arange(0, COLUMNS)
    q = operand(q, first, start, shape[0], F.D, ROWS, F.BLOCK_D, F, F.FP32)
    k = load_rows(keys, start, T, k_stride, F.D, COLUMNS, F.BLOCK_D, EDGE, F)
    product = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    x, visible, bent = tile_logits(
        product, i[:, None], j[None, :], shape, scale, cap, mask, bias, far, F, EDGE
    )
    p = probability(x, peak[:, None], log_total[:, None], F)
    v = load_rows(values, start, T, v_stride, F.DV, COLUMNS, F.BLOCK_DV, EDGE, F)
    dout = operand(dout, first, start, shape[0], F.DV, ROWS, F.BLOCK_DV, F, F.FP32)
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
    peak, log_total = row_statistics(peaks, log_totals, i, rows, F)
    delta = tl.load(deltas + i, mask=i < rows, other=0.0)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    pieces = (ranges[5] - ranges[0]) * (F.BLOCK_N // COLUMNS)
    for index in tl.range(0, pieces, num_stages=1):
        start = careful_start(index, ranges, F.BLOCK_N, COLUMNS)
        acc, _, _, _, _ = _rows_step(
            acc, 0.0, 0.0, 0.0, 0.0, (q, queries, q_stride), (dout, douts, dout_stride), peak,
            log_total, delta, keys, values, start, first, shape, scale, cap, mask, bias, 0.0, 0.0,
            True, dropout, keep_scale, k_stride, v_stride, lut, 0, F, True, True, ROWS,
            COLUMNS)  # fmt: skip
    store_rows(dq, first, rows, dq_stride, acc * grad_scale, F.D, ROWS, F.BLOCK_D, F)


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    masking = (0, 0, 0)
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
            unsure = unsure & (tl.abs(peak) > LSE_TRUSTED)
        if tl.max(tl.where(unsure, 1, 0), 0) > 0:
            peak, log_sum = _rows_statistics_anew(
                q_rows, k_base, k_strides, first, ranges, shape, scale, cap, masking, bias, F
            )
        peak = tl.where(peak == float("-inf"), float("inf"), peak)
        tl.store(shift + at + i, peak, mask=i < rows)
        tl.store(log_total + at + i, log_sum, mask=i < rows)
    else:
        peak, log_sum = row_statistics(lse + at, lse + at, i, rows, F)

    if F.WRITE_DQ or F.ROW_SUMS or F.BUCKETS > 0:
        BUCKETS: tl.constexpr = max(F.BUCKETS, 1)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        low_sum = tl.zeros([BLOCK_M], tl.float32)
        high_sum = tl.zeros([BLOCK_M], tl.float32)
        buckets = tl.zeros([BUCKETS], tl.float32)
        queries = (q_rows, q_base, q_strides)
        douts = (dout_rows, dout_base, dout_strides)
        for index in range(full_count(ranges)):
            block = full_block(index, ranges)
            acc, row_sum, low_sum, high_sum, buckets = _rows_step(
                acc, row_sum, low_sum, high_sum, buckets, queries, douts, peak, log_sum,
                delta_rows, k_base, v_base, block * F.BLOCK_N, first, shape, scale, cap, masking,
                bias, far_lo, far_hi, block < ranges[2], dropout, keep_scale, k_strides, v_strides,
                lut, first_bucket, F, False, False, BLOCK_M, F.BLOCK_N)  # fmt: skip
        if F.EDGE:
            for index in range(edge_count(ranges)):
                acc, row_sum, low_sum, high_sum, buckets = _rows_step(
                    acc, row_sum, low_sum, high_sum, buckets, queries, douts, peak, log_sum,
                    delta_rows, k_base, v_base, edge_block(index, ranges) * F.BLOCK_N, first, shape,
                    scale, cap, masking, bias, 0.0, 0.0, True, dropout, keep_scale, k_strides,
                    v_strides, lut, first_bucket, F, True, False, BLOCK_M, F.BLOCK_N)  # fmt: skip
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
