"""Attention's backward in Triton: gradients in a fixed order, in O(S) scratch a head.

    delta = rowsum(dout out) - dlse
    p = exp(logits - lse);  dp = dropout(dout v^T);  ds = p (dp - delta)
    dq = scale ds k;  dk = scale ds^T q;  dv = dropout(p)^T dout;  dmask, dtable = sums of ds

The rows kernel owns BLOCK_M rows: delta, dq, row sums of ds (a mask without a key axis) and sums
of ds by bucket (the table). The columns kernel owns BLOCK_N keys: dk, dv and column sums of ds (a
mask without a row axis). The mask kernel owns a tile of a mask with both axes. Nothing is added
atomically; what several programs contribute to is written apart and summed after.
"""

import torch
import triton
import triton.language as tl

from .attention_bwd_columns import attention_bwd_columns_kernel
from .attention_bwd_rows import attention_bwd_rows_kernel
from .common import (
    bias_place,
    dropout_keep,
    dropout_place,
    head_base,
    load_rows,
    probability,
    row_statistics,
    tile_logits,
)
from .launch import UNSPECIALIZED, Call, specialize
from .plan import Plan


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    for number in range(batch_sum * head_sum * met):
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
        peak, log_sum = row_statistics(shift + at, log_total + at, i, S, F)
        p = probability(x, peak[:, None], log_sum[:, None], F)
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
    want_dq, want_dk, want_dv, want_mask, want_table = (
        bool(need & bit) for bit in (1, 2, 4, 8, 16)
    )
    both_axes = want_mask and mask.size(2) > 1 and mask.size(3) > 1
    row_sums = want_mask and not both_axes and plan.features.MASK_AXES == "i"
    column_sums = want_mask and not both_axes and not row_sums
    f = specialize(
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
            specialize(
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
            features = specialize(
                f, BUCKETS=width, WRITE_DQ=want_dq and first == 0, ROW_SUMS=row_sums and first == 0
            )
            yield rows_call(features, tile, part, first, lut)
            summed = part.view(B, H, tiles, width).sum((0, 2))
            dtable[first : first + width].copy_(summed.t()[: buckets - first])

    if want_dk or want_dv or column_sums:
        tile = plan.tile("columns")
        tiles = plan.tiles(T, tile.block_n)
        parts = [f]
        if want_dk and want_dv and f.FP32 and max(f.BLOCK_D, f.BLOCK_DV) > 128:
            # Two accumulators this wide do not fit in registers beside fp32 operands.
            parts = [specialize(f, WRITE_DV=False)]
            parts += [specialize(f, WRITE_DK=False, COLUMN_SUMS=False)]
        for part in parts:
            yield Call(
                attention_bwd_columns_kernel,
                (tiles * B * G,),
                (dk, dv, column_part, delta, shift, log_total, dout,
                 dk.stride() if want_dk else (0, 0, 0, 0), dv.stride() if want_dv else (0, 0, 0, 0),
                 dout.stride(), tiles, B * G, plan.section(B * G), scale, *plan.shared_args()),
                specialize(
                    part, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
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
            specialize(f, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EDGE=True),
            tile.num_warps,
            tile.num_stages,
        )  # fmt: skip
    elif want_mask:
        part = row_part[..., None] if row_sums else column_part[:, :, None, :]
        summed = [d for d in range(4) if mask.size(d) == 1 and part.size(d) != 1]
        dmask.copy_(part.sum(summed, keepdim=True) if summed else part)
