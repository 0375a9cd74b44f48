"""Cross-entropy in Triton: one program a row for the loss, one a tile of a row for the gradient.

    ce = (1 - e) w_t (lse - x_t) + e / V sum_c w_c (lse - x_c),    z = z_loss lse^2

The launchers take the inner argument lists of fasttx/ops/cross_entropy.py and fill every element.
A row whose target is out of range gives NaN.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import LOG2E
from .launch import Call

if triton.knobs.runtime.interpret:
    from . import interpreter

    interpreter.apply()

LOWEST = tl.constexpr(-3.4028234663852886e38)


@dataclass(frozen=True)
class Features:
    """What these kernels are specialized on; passed as one constexpr."""

    BLOCK: int
    WEIGHT: bool = False
    SMOOTH: bool = False
    Z: bool = False
    MEAN: bool = False
    GRADIENT: bool = False  # the forward leaves the gradient in the logits
    LATER: bool = False  # ... without the division by the number of rows
    RESIDUALS: bool = True
    TILES: int = 1  # blocks of a row done by one program of the backward
    BLOCK_M: int = 1
    BLOCK_N: int = 1


@triton.jit
def _norm(norm, weight_sum, target, weight, rows, V, ignore_index, F: tl.constexpr):
    """norm [2] = 1 / sum of the targets' weights, 1 / count of rows used (1, 1 unless MEAN), and
    the sum of all class weights."""
    BLOCK: tl.constexpr = F.BLOCK
    i = tl.arange(0, BLOCK)
    if F.SMOOTH:
        total = tl.zeros([BLOCK], tl.float32)
        if F.WEIGHT:
            for first in range(0, V, F.BLOCK):
                total += tl.load(weight + first + i, mask=first + i < V, other=0.0)
            tl.store(weight_sum, tl.sum(total, 0))
        else:
            tl.store(weight_sum, V.to(tl.float32))
    if F.MEAN:
        count = tl.zeros([BLOCK], tl.float32)
        weights = tl.zeros([BLOCK], tl.float32)
        for first in range(0, rows, F.BLOCK):
            t = tl.load(target + first + i, mask=first + i < rows, other=ignore_index)
            used = t != ignore_index
            count += tl.where(used, 1.0, 0.0)
            inside = used & (t >= 0) & (t < V)
            if F.WEIGHT:
                weights += tl.load(weight + t, mask=inside, other=0.0)
            else:
                weights += tl.where(inside, 1.0, 0.0)
        tl.store(norm, 1.0 / tl.sum(weights, 0))
        tl.store(norm + 1, 1.0 / tl.sum(count, 0))
    else:
        tl.store(norm, 1.0)
        tl.store(norm + 1, 1.0)


@triton.jit
def _row(base, row, S, stride):
    return base + (row // S).to(tl.int64) * stride[0] + (row % S).to(tl.int64) * stride[1]


@triton.jit
def _slope(x, peak, log_sum, rise, fall, w, F: tl.constexpr):
    """rise * softmax(x) - fall * w."""
    d = rise * tl.exp2((x - peak) * LOG2E - log_sum * LOG2E)
    if F.SMOOTH:
        d -= fall * w
    return d


@triton.jit
def _columns(first, V, stride, F: tl.constexpr):
    """Column numbers of a block, their offsets in memory, and which exist."""
    c = first + tl.arange(0, F.BLOCK)
    return c, c.to(tl.int64) * stride, c < V


@triton.jit
def _class_weight(weight, c, inside, F: tl.constexpr):
    if F.WEIGHT:
        return tl.load(weight + c, mask=inside, other=0.0)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def _scales(peak, log_sum, w, weight_sum, V, smoothing, z_loss, ce_scale, z_scale, F: tl.constexpr):
    """(rise, fall, hit): the gradient is rise * softmax - fall * weight, less hit at the target."""
    hit = ce_scale * (1.0 - smoothing) * w
    fall = ce_scale * 0.0
    rise = hit
    if F.SMOOTH:
        fall = ce_scale * (smoothing / V)
        rise += fall * tl.load(weight_sum)
    if F.Z:
        rise += 2.0 * z_loss * (peak + log_sum) * z_scale
    return rise, fall, hit


@triton.jit
def _fill(base, stride, V, value, F: tl.constexpr):
    BLOCK: tl.constexpr = F.BLOCK
    for first in range(0, V, F.BLOCK):
        _, place, inside = _columns(first, V, stride, F)
        filled = tl.full([BLOCK], 0.0, tl.float32) + value
        tl.store(base + place, filled.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _forward(values, peaks, log_sums, logits, stride, S, target, weight, weight_sum, norm, rows, V,
             ignore_index, smoothing, z_loss, F: tl.constexpr):  # fmt: skip
    BLOCK: tl.constexpr = F.BLOCK
    row = tl.program_id(0)
    t = tl.load(target + row)
    base = _row(logits, row, S, stride)
    used = t != ignore_index
    valid = used & (t >= 0) & (t < V)
    if valid:
        peak = LOWEST + 0.0
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        for first in range(0, V, F.BLOCK):
            c, place, inside = _columns(first, V, stride[2], F)
            x = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
            if F.SMOOTH:
                weighted += x * _class_weight(weight, c, inside, F)
            x = tl.where(inside, x, float("-inf"))
            higher = tl.maximum(peak, tl.max(x, 0))
            total = total * tl.exp2((peak - higher) * LOG2E) + tl.exp2((x - higher) * LOG2E)
            peak = higher
        log_sum = tl.log(tl.sum(total, 0))
        w = 1.0
        if F.WEIGHT:
            w = tl.load(weight + t)
        at_target = tl.load(base + t * stride[2]).to(tl.float32)
        lse = peak + log_sum
        ce = (1.0 - smoothing) * w * ((peak - at_target) + log_sum)
        if F.SMOOTH:
            ce += smoothing / V * (tl.load(weight_sum) * lse - tl.sum(weighted, 0))
        ce_scale = tl.load(norm)
        z_scale = tl.load(norm + 1)
        value = ce * ce_scale
        if F.Z:
            value += z_loss * lse * lse * z_scale
        tl.store(values + row, value)
        if F.RESIDUALS:
            tl.store(peaks + row, peak)
            tl.store(log_sums + row, log_sum)
        if F.GRADIENT:
            if F.LATER:
                z_scale = z_scale / ce_scale
                ce_scale = 1.0
            rise, fall, hit = _scales(
                peak, log_sum, w, weight_sum, V, smoothing, z_loss, ce_scale, z_scale, F
            )
            tl.debug_barrier()
            for first in range(0, V, F.BLOCK):
                c, place, inside = _columns(first, V, stride[2], F)
                x = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
                class_weight = 0.0
                if F.SMOOTH:
                    class_weight = _class_weight(weight, c, inside, F)
                d = _slope(x, peak, log_sum, rise, fall, class_weight, F)
                d = tl.where(c == t, d - hit, d)
                tl.store(base + place, d.to(base.dtype.element_ty), mask=inside)
    else:
        value = tl.where(used, float("nan"), 0.0)
        tl.store(values + row, value)
        if F.RESIDUALS:
            tl.store(peaks + row, 0.0)
            tl.store(log_sums + row, 0.0)
        if F.GRADIENT:
            _fill(base, stride[2], V, value, F)


@triton.jit
def _reduce(loss, factor, values, target, norm, rows, ignore_index, F: tl.constexpr):
    """loss = the sum of the rows' values, in a fixed order; the mean of nothing is NaN."""
    BLOCK: tl.constexpr = F.BLOCK
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    used = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, F.BLOCK):
        inside = first + i < rows
        total += tl.load(values + first + i, mask=inside, other=0.0)
        t = tl.load(target + first + i, mask=inside, other=ignore_index)
        used |= (t != ignore_index).to(tl.int32)
    sum = tl.sum(total, 0)
    if F.MEAN:
        sum = tl.where(tl.max(used, 0) == 0, float("nan"), sum)
    tl.store(loss, sum)


@triton.jit
def _backward(dlogits, out_stride, dloss, dloss_stride, logits, stride, S, target, weight,
              weight_sum, peaks, log_sums, norm, V, ignore_index, smoothing, z_loss,
              F: tl.constexpr):  # fmt: skip
    BLOCK: tl.constexpr = F.BLOCK
    row = tl.program_id(0)
    t = tl.load(target + row)
    base = _row(logits, row, S, stride)
    out = _row(dlogits, row, S, out_stride)
    used = t != ignore_index
    valid = used & (t >= 0) & (t < V)
    begin = tl.program_id(1) * (F.BLOCK * F.TILES)
    end = tl.minimum(begin + F.BLOCK * F.TILES, V)
    if valid:
        up = tl.load(dloss + row.to(tl.int64) * dloss_stride)
        peak = tl.load(peaks + row)
        log_sum = tl.load(log_sums + row)
        w = 1.0
        if F.WEIGHT:
            w = tl.load(weight + t)
        rise, fall, hit = _scales(
            peak, log_sum, w, weight_sum, V, smoothing, z_loss, up * tl.load(norm),
            up * tl.load(norm + 1), F)  # fmt: skip
        for first in range(begin, end, F.BLOCK):
            c, place, inside = _columns(first, V, stride[2], F)
            x = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
            class_weight = 0.0
            if F.SMOOTH:
                class_weight = _class_weight(weight, c, inside, F)
            d = _slope(x, peak, log_sum, rise, fall, class_weight, F)
            d = tl.where(c == t, d - hit, d)
            place = c.to(tl.int64) * out_stride[2]
            tl.store(out + place, d.to(out.dtype.element_ty), mask=inside)
    else:
        value = tl.where(used, float("nan"), 0.0)
        for first in range(begin, end, F.BLOCK):
            _, place, inside = _columns(first, V, out_stride[2], F)
            filled = tl.full([BLOCK], 0.0, tl.float32) + value
            tl.store(out + place, filled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rescale(grad, stride, S, dloss, dloss_stride, factor, target, V, ignore_index,
             F: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    by = tl.load(dloss + row.to(tl.int64) * dloss_stride) * tl.load(factor)
    if (by != 1.0) & (tl.load(target + row) != ignore_index):
        base = _row(grad, row, S, stride)
        begin = tl.program_id(1) * (F.BLOCK * F.TILES)
        for first in range(begin, tl.minimum(begin + F.BLOCK * F.TILES, V), F.BLOCK):
            _, place, inside = _columns(first, V, stride[2], F)
            d = tl.load(base + place, mask=inside, other=0.0).to(tl.float32) * by
            tl.store(base + place, d.to(base.dtype.element_ty), mask=inside)


def _shape(logits, weight=None, smoothing=0.0, z_loss=0.0, reduction=0, **more):
    """(features, warps): a block of at most 4096 classes, four to eight elements a thread."""
    block = max(16, min(4096, triton.next_power_of_2(logits.shape[2])))
    features = Features(
        BLOCK=block, WEIGHT=weight is not None, SMOOTH=smoothing != 0, Z=z_loss != 0,
        MEAN=reduction == 1, TILES=4, **more,
    )  # fmt: skip
    return features, max(1, min(16, block // 256))


def forward_calls(loss, peak, log_sum, norm, factor, logits, target, weight, ignore_index,
                  reduction, smoothing, z_loss, gradient):  # fmt: skip
    """The launches of the forward; with gradient, logits become their own gradient."""
    rows, V = target.numel(), logits.shape[2]
    later = gradient and logits.dtype == torch.float16 and reduction == 1
    F, warps = _shape(
        logits, weight, smoothing, z_loss, reduction,
        GRADIENT=gradient, LATER=later, RESIDUALS=peak is not None,
    )  # fmt: skip
    weight_sum = norm.new_empty(1)
    values = norm.new_empty(rows) if reduction else loss
    one, _ = _shape(logits, weight, smoothing, z_loss, reduction)
    one = Features(BLOCK=1024, WEIGHT=one.WEIGHT, SMOOTH=one.SMOOTH, MEAN=one.MEAN)
    yield Call(_norm, (1,), (norm, weight_sum, target, weight, rows, V, ignore_index), one, 8, 1)
    arguments = (values, peak, log_sum, logits, logits.stride(), logits.shape[1], target, weight,
                 weight_sum, norm, rows, V, ignore_index, smoothing, z_loss)  # fmt: skip
    yield Call(_forward, (rows,), arguments, F, warps, 2)
    if reduction:
        yield Call(
            _reduce, (1,), (loss, factor, values, target, norm, rows, ignore_index), one, 4, 1
        )


def backward_calls(dlogits, dloss, logits, target, weight, peak, log_sum, norm, ignore_index,
                   reduction, smoothing, z_loss, weight_sum=None):  # fmt: skip
    rows, V = target.numel(), logits.shape[2]
    F, warps = _shape(logits, weight, smoothing, z_loss, reduction)
    weight_sum = norm.new_empty(1)
    if F.SMOOTH:
        one = Features(BLOCK=1024, WEIGHT=F.WEIGHT, SMOOTH=True)
        arguments = (norm.new_empty(2), weight_sum, target, weight, 0, V, ignore_index)
        yield Call(_norm, (1,), arguments, one, 8, 1)
    step = dloss.stride(0) if dloss.dim() else 0
    arguments = (dlogits, dlogits.stride(), dloss, step, logits, logits.stride(), logits.shape[1],
                 target, weight, weight_sum, peak, log_sum, norm, V, ignore_index, smoothing,
                 z_loss)  # fmt: skip
    yield Call(_backward, (rows, triton.cdiv(V, F.BLOCK * F.TILES)), arguments, F, warps, 2)


def rescale_calls(grad, dloss, factor, target, ignore_index):
    F, warps = _shape(grad)
    step = dloss.stride(0) if dloss.dim() else 0
    V = grad.shape[2]
    arguments = (grad, grad.stride(), grad.shape[1], dloss, step, factor, target, V, ignore_index)
    grid = (target.numel(), triton.cdiv(V, F.BLOCK * F.TILES))
    yield Call(_rescale, grid, arguments, F, warps, 2)


def cross_entropy_fwd(loss, peak, log_sum, norm, logits, target, weight, *scalars):
    for call in forward_calls(
        loss, peak, log_sum, norm, None, logits, target, weight, *scalars, False
    ):
        call.run()


def cross_entropy_bwd(dlogits, *args):
    for call in backward_calls(dlogits, *args):
        call.run()


def cross_entropy_inplace(loss, factor, logits, target, weight, *scalars):
    norm = loss.new_empty(2)
    for call in forward_calls(
        loss, None, None, norm, factor, logits, target, weight, *scalars, True
    ):
        call.run()
    if logits.dtype == torch.float16:
        factor.copy_(norm[0])
    else:
        factor.fill_(1.0)


def cross_entropy_rescale(grad, dloss, factor, target, ignore_index):
    for call in rescale_calls(grad, dloss, factor, target, ignore_index):
        call.run()
