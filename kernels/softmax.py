"""softmax(scale * x + mask) and its logarithm in Triton, forward and backward.

A program of the row kernels holds BLOCK_M rows by BLOCK_N columns: all columns where they fit
(ONE), else it goes over them twice, the first time with a running maximum. The mask's gradient
comes from a kernel of its own, whose programs sum a fixed range of the rows that share a row of the
mask; the partial sums are added in order, so nothing depends on timing.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from .common import LN2, LOG2E
from .launch import Call

ELEMENTS = 4096  # of a tile held in registers
PARTS = 256  # row ranges that are summed apart, at most


@dataclass(frozen=True)
class SoftmaxFeatures:
    """Everything a kernel is specialized on; passed as one constexpr."""

    BLOCK_M: int
    BLOCK_N: int
    ONE: bool  # a block holds all columns
    LOG: bool
    CAUSAL: bool
    MASK: str = "none"  # "bool", "float"
    DX: bool = True
    SUMS: bool = False  # the backward keeps each row's sum
    READY: bool = False  # what the mask's gradient sums is there, one number a row


@triton.jit
def _indices(m, sizes):
    rest = m // sizes[1]
    return rest // sizes[0], rest % sizes[0], m % sizes[1]


@triton.jit
def _rows(base, stride, i):
    return base + (i[0] * stride[0] + i[1] * stride[1] + i[2] * stride[2])


@triton.jit
def _columns(rows, stride, n):
    return rows[:, None] + (n.to(tl.int64) * stride[3])[None, :]


@triton.jit
def _logits(x, mask, strides, i, n, live, scale, offset, F: tl.constexpr):
    """scale * x + mask of one tile, -inf where hidden or not live."""
    value = tl.load(_columns(_rows(x, strides[0], i), strides[0], n), mask=live, other=0.0)
    z = value.to(tl.float32) * scale
    if F.MASK != "none":
        added = tl.load(_columns(_rows(mask, strides[1], i), strides[1], n), mask=live, other=0)
        if F.MASK == "bool":
            live = live & (added != 0)
        else:
            added = added.to(tl.float32)
            live = live & (added != float("-inf"))
            z += added
    if F.CAUSAL:
        live = live & (n[None, :] <= i[2][:, None] + offset)
    return tl.where(live, z, float("-inf"))


@triton.jit
def _shift(peak):
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _write(out, stride, i, n, live, z, shift, total, F: tl.constexpr):
    """The result of a tile of logits from its rows' maximum and sum."""
    z = z - shift[:, None]
    if F.LOG:
        log_total = tl.where(total == 0.0, float("inf"), tl.log2(total) * LN2)
        y = z - log_total[:, None]
    else:
        inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
        y = tl.exp2(z * LOG2E) * inverse[:, None]
    tl.store(_columns(_rows(out, stride, i), stride, n), y.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M", "size1", "size2", "offset"])
def softmax_fwd_kernel(
    out, x, mask, out_stride, x_stride, mask_stride, M, N, size1, size2, scale, offset,
    F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None]
    i = _indices(m, (size1, size2))
    strides = (x_stride, mask_stride)
    if F.ONE:
        n = tl.arange(0, BLOCK_N)
        live = inside & (n < N)[None, :]
        z = _logits(x, mask, strides, i, n, live, scale, offset, F)
        shift = _shift(tl.max(z, 1))
        total = tl.sum(tl.exp2((z - shift[:, None]) * LOG2E), 1)
        _write(out, out_stride, i, n, live, z, shift, total, F)
    else:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            live = inside & (n < N)[None, :]
            z = _logits(x, mask, strides, i, n, live, scale, offset, F)
            higher = tl.maximum(peak, tl.max(z, 1))
            shift = _shift(higher)[:, None]
            decay = tl.exp2((peak[:, None] - shift) * LOG2E)
            total = total * decay + tl.exp2((z - shift) * LOG2E)
            peak = higher
        shift = _shift(peak)
        sums = tl.sum(total, 1)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            live = inside & (n < N)[None, :]
            z = _logits(x, mask, strides, i, n, live, scale, offset, F)
            _write(out, out_stride, i, n, live, z, shift, sums, F)


@triton.jit
def _results(out, dout, strides, i, n, live, F: tl.constexpr):
    """(y, dy, which take part) of one tile."""
    y = tl.load(_columns(_rows(out, strides[0], i), strides[0], n), mask=live, other=0.0)
    dy = tl.load(_columns(_rows(dout, strides[1], i), strides[1], n), mask=live, other=0.0)
    y = y.to(tl.float32)
    if F.LOG:
        live = live & (y != float("-inf"))
    else:
        live = live & (y != 0.0)
    return y, tl.where(live, dy.to(tl.float32), 0.0), live


@triton.jit
def _weighted(y, dy, F: tl.constexpr):
    if F.LOG:
        return dy
    else:
        return y * dy


@triton.jit
def _gradient(y, dy, live, sums, F: tl.constexpr):
    if F.LOG:
        d = dy - tl.exp2(y * LOG2E) * sums[:, None]
    else:
        d = y * (dy - sums[:, None])
    return tl.where(live, d, 0.0)


@triton.jit(do_not_specialize=["M", "size1", "size2"])
def softmax_rows_kernel(
    dx, sums, totals, dout, out, dx_stride, dout_stride, out_stride, M, N, size1, size2, scale,
    F: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_M rows. With SUMS, sums [M] gets what the rows' gradients need, totals [M] the
    sums of the gradients of the logits."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None]
    i = _indices(m, (size1, size2))
    strides = (out_stride, dout_stride)
    total = tl.zeros([BLOCK_M], tl.float32)
    if F.ONE:
        n = tl.arange(0, BLOCK_N)
        inside = inside & (n < N)[None, :]
        y, dy, live = _results(out, dout, strides, i, n, inside, F)
        row = tl.sum(_weighted(y, dy, F), 1)
        d = _gradient(y, dy, live, row, F)
        if F.SUMS:
            total = tl.sum(d, 1)
        if F.DX:
            to = _columns(_rows(dx, dx_stride, i), dx_stride, n)
            tl.store(to, (d * scale).to(dx.dtype.element_ty), mask=inside)
    else:
        row = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            y, dy, live = _results(out, dout, strides, i, n, inside & (n < N)[None, :], F)
            row += tl.sum(_weighted(y, dy, F), 1)
        if F.DX or F.SUMS:
            for start in range(0, N, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                within = inside & (n < N)[None, :]
                y, dy, live = _results(out, dout, strides, i, n, within, F)
                d = _gradient(y, dy, live, row, F)
                if F.SUMS:
                    total += tl.sum(d, 1)
                if F.DX:
                    to = _columns(_rows(dx, dx_stride, i), dx_stride, n)
                    tl.store(to, (d * scale).to(dx.dtype.element_ty), mask=within)
    if F.SUMS:
        tl.store(sums + m, row, mask=m < M)
        tl.store(totals + m, total, mask=m < M)


@triton.jit(do_not_specialize=["shared", "part_rows", "kept1", "kept2", "shared1", "shared2"])
def softmax_mask_kernel(
    partials, sums, dout, out, dout_stride, out_stride, row_stride, shared, parts, part_rows,
    columns, kept1, kept2, shared1, shared2, F: tl.constexpr,
):  # fmt: skip
    """partials [units, parts, columns] fp32: the gradients of the logits summed over one part of
    the rows that share row `unit` of the mask, for BLOCK_N columns."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    blocks = tl.cdiv(columns, BLOCK_N)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = slot // parts
    part = slot % parts
    own = _indices(unit, (kept1, kept2))
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = tl.minimum((part + 1) * part_rows, shared)
    for first in range(0, part_rows, BLOCK_M):
        q = part * part_rows + first + tl.arange(0, BLOCK_M)
        inside = q < end
        other = _indices(q, (shared1, shared2))
        i = (own[0] + other[0], own[1] + other[1], own[2] + other[2])
        row = tl.load(_rows(sums, row_stride, i), mask=inside, other=0.0)
        if F.READY:
            acc += tl.where(inside[:, None] & (n < columns)[None, :], row[:, None], 0.0)
        else:
            live = inside[:, None] & (n < columns)[None, :]
            y, dy, live = _results(out, dout, (out_stride, dout_stride), i, n, live, F)
            acc += _gradient(y, dy, live, row, F)
    tl.store(partials + slot * columns + n, tl.sum(acc, 0), mask=n < columns)


@triton.jit(do_not_specialize=["parts"])
def softmax_finish_kernel(dmask, partials, parts, columns, F: tl.constexpr):
    """dmask [units, columns]: the partial sums of each unit added in order."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    blocks = tl.cdiv(columns, BLOCK_N)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for part in range(parts):
        total += tl.load(
            partials + (unit * parts + part) * columns + n, mask=n < columns, other=0.0
        )
    tl.store(dmask + unit * columns + n, total.to(dmask.dtype.element_ty), mask=n < columns)


def _strides(t) -> tuple:
    """Of the last four dimensions, 0 along those that are missing or of size 1."""
    own = [s if n > 1 else 0 for n, s in zip(t.shape, t.stride(), strict=True)]
    return tuple([0] * (4 - len(own)) + own)


def _sizes(t) -> list:
    return [1] * (4 - t.dim()) + list(t.shape)


def _features(x, log: bool, causal: bool, **more) -> tuple[SoftmaxFeatures, int]:
    """(features, warps): rows side by side in memory make a tile taller."""
    M, N, elements = x[..., 0].numel() if x.shape[-1] else 0, x.shape[-1], ELEMENTS
    if N > 1 and x.stride(-1) != 1:  # addresses take more registers
        elements //= 2
    block_n = max(16, min(triton.next_power_of_2(N), elements))
    if elements < ELEMENTS:
        block_n = min(block_n, max(16, elements // 32))
    block_m = max(1, min(elements // block_n, triton.next_power_of_2(M)))
    features = SoftmaxFeatures(block_m, block_n, block_n >= N, log, causal, **more)
    return features, max(1, min(8, block_m * block_n // (512 if elements == ELEMENTS else 256)))


def forward_calls(out, x, mask, scale, causal, lower_right, log, wide):
    """The launches of the forward."""
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    F, warps = _features(x, log, causal, MASK=kind)
    _, size1, size2, N = _sizes(x)
    M = x.numel() // N if N else 0
    mask_stride = (0, 0, 0, 0) if mask is None else _strides(mask)
    arguments = (
        *(out, x, mask.view(torch.uint8) if kind == "bool" else mask),
        *(_strides(out), _strides(x), mask_stride, M, N, size1, size2),
        *(scale, N - size2 if lower_right else 0),
    )
    yield Call(softmax_fwd_kernel, (triton.cdiv(M, F.BLOCK_M),), arguments, F, warps, 2)


def backward_calls(dx, dmask, dout, out, x, mask, scale, causal, lower_right, log, need):
    sizes = _sizes(x)
    _, size1, size2, N = sizes
    M = x.numel() // N if N else 0
    summed = bool(need & 2)
    F, warps = _features(x, log, causal, DX=bool(need & 1), SUMS=summed)
    sums = totals = None
    if summed:
        sums, totals = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = (
        *(dx, sums, totals, dout, out),
        *(_strides(dx) if need & 1 else (0, 0, 0, 0), _strides(dout), _strides(out)),
        *(M, N, size1, size2, scale),
    )
    yield Call(softmax_rows_kernel, (triton.cdiv(M, F.BLOCK_M),), arguments, F, warps, 2)
    if not summed:
        return
    *kept, columns = _sizes(mask)
    shares = [1 if k == n else n for k, n in zip(kept, sizes, strict=False)]
    units = kept[0] * kept[1] * kept[2]
    shared = shares[0] * shares[1] * shares[2]
    block_n = max(16, min(triton.next_power_of_2(columns), 128))
    block_m = max(1, min(ELEMENTS // 2 // block_n, triton.next_power_of_2(shared)))
    parts = max(1, min(PARTS // max(1, units), triton.cdiv(shared, block_m)))
    part_rows = triton.cdiv(triton.cdiv(shared, parts), block_m) * block_m
    parts = max(1, triton.cdiv(shared, max(1, part_rows)))
    F = replace(F, BLOCK_M=block_m, BLOCK_N=block_n, READY=columns == 1)
    partials = torch.empty(units * parts * columns, dtype=torch.float32, device=x.device)
    arguments = (
        *(partials, totals if F.READY else sums, dout, out, _strides(dout), _strides(out)),
        *((size1 * size2, size2, 1), shared, parts, part_rows, columns),
        *(kept[1], kept[2], shares[1], shares[2]),
    )
    blocks = triton.cdiv(columns, block_n)
    yield Call(softmax_mask_kernel, (units * parts * blocks,), arguments, F, 4, 2)
    arguments = (dmask, partials, parts, columns)
    yield Call(softmax_finish_kernel, (units * blocks,), arguments, replace(F, BLOCK_M=1), 4, 1)


def softmax_fwd(out, *args):
    """Fill out, the softmax of the last dimension."""
    for call in forward_calls(out, *args):
        call.run()


def softmax_bwd(*args):
    """Fill the gradients asked for by need: dx 1, dmask 2."""
    for call in backward_calls(*args):
        call.run()
