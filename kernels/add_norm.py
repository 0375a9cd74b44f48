"""norm(residual + dropout(x + x_bias)) in Triton, forward and backward.

A program of the row kernels holds BLOCK_M rows by BLOCK_N columns: all columns where they fit
(ONE), else it goes over them several times. Parameter gradients come from a kernel of their own,
whose programs sum a fixed range of rows; the partial sums are added in order, so nothing depends on
timing.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from .common import dropout_keep
from .launch import Call, device_arch

ELEMENTS = 4096  # of a tile held in registers
PARTS = 256  # row ranges that are summed apart, at most


@dataclass(frozen=True)
class NormFeatures:
    """Everything a kernel is specialized on; passed as one constexpr."""

    BLOCK_M: int
    BLOCK_N: int
    ONE: bool  # a block holds all columns
    FLAT: bool  # rows lie evenly in every input
    WIDE: bool  # offsets along a row can pass 2^31
    RMS: bool
    DROPOUT: bool
    RESIDUAL: bool
    WEIGHT: bool
    BIAS: bool
    X_BIAS: bool
    TOTAL: bool  # the sum: written forward, with a gradient of its own backward
    DOUT: bool = True
    NEED: int = 0  # dx 1, dresidual 2, dweight 4, dbias 8, dx_bias 16


@triton.jit
def _columns(start, F: tl.constexpr):
    n = start + tl.arange(0, F.BLOCK_N)
    if F.WIDE:
        n = n.to(tl.int64)
    return n


@triton.jit
def _load(base, stride, sizes, m, n, live, F: tl.constexpr):
    """Rows m, columns n of an input as fp32, zero where not live."""
    if F.FLAT:
        rows = m * stride[2]
    else:
        size1, size2 = sizes
        rest = m // size2
        rows = rest // size1 * stride[0] + rest % size1 * stride[1] + m % size2 * stride[2]
    pointers = base + (rows[:, None] + (n * stride[3])[None, :])
    return tl.load(pointers, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _parameter(base, stride, n, N):
    return tl.load(base + n * stride, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _kept(first, start, seed, threshold, F: tl.constexpr):
    key = tl.load(seed).to(tl.uint64)
    none = tl.zeros([], tl.uint32)
    place = (key.to(tl.uint32), (key >> 32).to(tl.uint32), none, none, threshold)
    return dropout_keep(first, start, place, F.BLOCK_M, F.BLOCK_N)


@triton.jit
def _sum(inputs, sizes, dropout, first, start, m, n, live, N, F: tl.constexpr):
    """residual + dropout(x + x_bias) of one tile, zero where not live."""
    x, x_stride, residual, residual_stride, x_bias, x_bias_stride = inputs
    z = _load(x, x_stride, sizes, m, n, live, F)
    if F.X_BIAS:
        z += _parameter(x_bias, x_bias_stride, n, N)
    if F.DROPOUT:
        seed, threshold, keep_scale = dropout
        z = tl.where(_kept(first, start, seed, threshold, F), z * keep_scale, 0.0)
    if F.RESIDUAL:
        z += _load(residual, residual_stride, sizes, m, n, live, F)
    return tl.where(live, z, 0.0)


@triton.jit
def _store(base, m, n, N, value, live):
    """Into a contiguous output."""
    tl.store(base + (m[:, None] * N + n[None, :]), value.to(base.dtype.element_ty), mask=live)


@triton.jit
def _write_out(out, total, z, mean, rstd, weight, bias, m, n, N, live, F: tl.constexpr):
    if F.TOTAL:
        _store(total, m, n, N, z, live)
    y = (z - mean[:, None]) * rstd[:, None]
    if F.WEIGHT:
        y *= _parameter(weight[0], weight[1], n, N)
    if F.BIAS:
        y += _parameter(bias[0], bias[1], n, N)
    _store(out, m, n, N, y, live)


@triton.jit(do_not_specialize=["M", "size1", "size2", "threshold"])
def add_norm_fwd_kernel(
    out, total, stats, x, residual, weight, bias, x_bias, seed,
    x_stride, residual_stride, weight_stride, bias_stride, x_bias_stride,
    M, N, size1, size2, eps, threshold, keep_scale, F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None]
    inputs = (x, x_stride, residual, residual_stride, x_bias, x_bias_stride)
    sizes = (size1, size2)
    dropout = (seed, threshold, keep_scale)
    scale = (weight, weight_stride)
    shift = (bias, bias_stride)
    mean = tl.zeros([BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    if F.ONE:
        n = _columns(0, F)
        live = inside & (n < N)[None, :]
        z = _sum(inputs, sizes, dropout, first, 0, m, n, live, N, F)
        if not F.RMS:
            mean = tl.sum(z, 1) / N
        centered = tl.where(live, z - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / N + eps)
        _write_out(out, total, z, mean, rstd, scale, shift, m, n, N, live, F)
    else:
        if not F.RMS:
            for start in range(0, N, BLOCK_N):
                n = _columns(start, F)
                live = inside & (n < N)[None, :]
                mean += tl.sum(_sum(inputs, sizes, dropout, first, start, m, n, live, N, F), 1)
            mean = mean / N
        for start in range(0, N, BLOCK_N):
            n = _columns(start, F)
            live = inside & (n < N)[None, :]
            z = _sum(inputs, sizes, dropout, first, start, m, n, live, N, F)
            centered = tl.where(live, z - mean[:, None], 0.0)
            square += tl.sum(centered * centered, 1)
        rstd = 1.0 / tl.sqrt(square / N + eps)
        for start in range(0, N, BLOCK_N):
            n = _columns(start, F)
            live = inside & (n < N)[None, :]
            z = _sum(inputs, sizes, dropout, first, start, m, n, live, N, F)
            _write_out(out, total, z, mean, rstd, scale, shift, m, n, N, live, F)
    if F.RMS:
        tl.store(stats + m, rstd, mask=m < M)
    else:
        tl.store(stats + m, mean, mask=m < M)
        tl.store(stats + M + m, rstd, mask=m < M)


@triton.jit
def _statistics(stats, m, M, F: tl.constexpr):
    BLOCK_M: tl.constexpr = F.BLOCK_M
    if F.RMS:
        return tl.zeros([BLOCK_M], tl.float32), tl.load(stats + m, mask=m < M, other=0.0)
    else:
        mean = tl.load(stats + m, mask=m < M, other=0.0)
        return mean, tl.load(stats + M + m, mask=m < M, other=0.0)


@triton.jit
def _upstream(dout, dout_stride, sizes, m, n, live, F: tl.constexpr):
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    if F.DOUT:
        return _load(dout, dout_stride, sizes, m, n, live, F)
    else:
        return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def _tile(inputs, sizes, dropout, upstream, scale, mean, rstd, first, start, m, n, live, N,
          F: tl.constexpr):  # fmt: skip
    """(xhat, dout, dout * weight) of one tile, zero where not live."""
    z = _sum(inputs, sizes, dropout, first, start, m, n, live, N, F)
    xhat = tl.where(live, (z - mean[:, None]) * rstd[:, None], 0.0)
    g = _upstream(upstream[0], upstream[1], sizes, m, n, live, F)
    gw = g
    if F.WEIGHT:
        gw = g * _parameter(scale[0], scale[1], n, N)
    return xhat, g, gw


@triton.jit
def _dz(xhat, gw, along, across, rstd, upstream, sizes, m, n, live, F: tl.constexpr):
    dz = (gw - along[:, None] - xhat * across[:, None]) * rstd[:, None]
    if F.TOTAL:
        dz += _load(upstream[2], upstream[3], sizes, m, n, live, F)
    return dz


@triton.jit
def _dropped(dz, dropout, first, start, F: tl.constexpr):
    if F.DROPOUT:
        seed, threshold, keep_scale = dropout
        return tl.where(_kept(first, start, seed, threshold, F), dz * keep_scale, 0.0)
    else:
        return dz


@triton.jit
def _write_gradients(dx, dresidual, dz, dropout, first, start, m, n, N, live, F: tl.constexpr):
    if F.NEED & 2:
        _store(dresidual, m, n, N, dz, live)
    if F.NEED & 1:
        _store(dx, m, n, N, _dropped(dz, dropout, first, start, F), live)


@triton.jit(do_not_specialize=["M", "size1", "size2", "threshold"])
def add_norm_rows_kernel(
    dx, dresidual, means, x, stats, dout, dtotal, residual, weight, x_bias, seed,
    x_stride, dout_stride, dtotal_stride, residual_stride, weight_stride, x_bias_stride,
    M, N, size1, size2, threshold, keep_scale, F: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of BLOCK_M rows. means [2, M] fp32 gets each row's mean of dout * weight and
    of dout * weight * xhat."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None]
    mean, rstd = _statistics(stats, m, M, F)
    inputs = (x, x_stride, residual, residual_stride, x_bias, x_bias_stride)
    upstream = (dout, dout_stride, dtotal, dtotal_stride)
    sizes = (size1, size2)
    dropout = (seed, threshold, keep_scale)
    scale = (weight, weight_stride)
    along = tl.zeros([BLOCK_M], tl.float32)
    across = tl.zeros([BLOCK_M], tl.float32)
    if F.ONE:
        n = _columns(0, F)
        live = inside & (n < N)[None, :]
        xhat, _, gw = _tile(inputs, sizes, dropout, upstream, scale, mean, rstd, first, 0, m, n,
                            live, N, F)  # fmt: skip
        if not F.RMS:
            along = tl.sum(gw, 1) / N
        across = tl.sum(gw * xhat, 1) / N
        dz = _dz(xhat, gw, along, across, rstd, upstream, sizes, m, n, live, F)
        _write_gradients(dx, dresidual, dz, dropout, first, 0, m, n, N, live, F)
    else:
        for start in range(0, N, BLOCK_N):
            n = _columns(start, F)
            live = inside & (n < N)[None, :]
            xhat, _, gw = _tile(inputs, sizes, dropout, upstream, scale, mean, rstd, first, start,
                                m, n, live, N, F)  # fmt: skip
            if not F.RMS:
                along += tl.sum(gw, 1)
            across += tl.sum(gw * xhat, 1)
        along = along / N
        across = across / N
        for start in range(0, N, BLOCK_N):
            n = _columns(start, F)
            live = inside & (n < N)[None, :]
            xhat, _, gw = _tile(inputs, sizes, dropout, upstream, scale, mean, rstd, first, start,
                                m, n, live, N, F)  # fmt: skip
            dz = _dz(xhat, gw, along, across, rstd, upstream, sizes, m, n, live, F)
            _write_gradients(dx, dresidual, dz, dropout, first, start, m, n, N, live, F)
    if F.NEED & 16:
        tl.store(means + m, along, mask=m < M)
        tl.store(means + M + m, across, mask=m < M)


@triton.jit(do_not_specialize=["M", "size1", "size2", "part_rows", "threshold"])
def add_norm_columns_kernel(
    partials, means, x, stats, dout, dtotal, residual, weight, x_bias, seed,
    x_stride, dout_stride, dtotal_stride, residual_stride, weight_stride, x_bias_stride,
    M, N, size1, size2, part_rows, threshold, keep_scale, F: tl.constexpr,
):  # fmt: skip
    """partials [parts, 3, N] fp32: the gradients of weight, bias and x_bias summed over one part's
    rows, for BLOCK_N columns."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    blocks = tl.cdiv(N, BLOCK_N)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK_N
    n = _columns(start, F)
    inputs = (x, x_stride, residual, residual_stride, x_bias, x_bias_stride)
    upstream = (dout, dout_stride, dtotal, dtotal_stride)
    sizes = (size1, size2)
    dropout = (seed, threshold, keep_scale)
    scale = (weight, weight_stride)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dx_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for offset in range(0, part_rows, BLOCK_M):
        first = part * part_rows + offset
        m = first + tl.arange(0, BLOCK_M)
        live = (m < M)[:, None] & (n < N)[None, :]
        mean, rstd = _statistics(stats, m, M, F)
        xhat, g, gw = _tile(inputs, sizes, dropout, upstream, scale, mean, rstd, first, start, m, n,
                            live, N, F)  # fmt: skip
        dweight += g * xhat
        dbias += g
        if F.NEED & 16:
            along = tl.load(means + m, mask=m < M, other=0.0)
            across = tl.load(means + M + m, mask=m < M, other=0.0)
            dz = _dz(xhat, gw, along, across, rstd, upstream, sizes, m, n, live, F)
            dx_bias += tl.where(live, _dropped(dz, dropout, first, start, F), 0.0)
    base = partials + part * 3 * N + n
    if F.NEED & 4:
        tl.store(base, tl.sum(dweight, 0), mask=n < N)
    if F.NEED & 8:
        tl.store(base + N, tl.sum(dbias, 0), mask=n < N)
    if F.NEED & 16:
        tl.store(base + 2 * N, tl.sum(dx_bias, 0), mask=n < N)


@triton.jit(do_not_specialize=["parts", "kind"])
def add_norm_finish_kernel(gradient, partials, parts, kind, N, F: tl.constexpr):
    """gradient [N] = the sum of one kind's partials over the parts, in order."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    n = _columns(tl.program_id(0) * BLOCK_N, F)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, parts, BLOCK_M):
        part = first + tl.arange(0, BLOCK_M)
        pointers = partials + ((part.to(tl.int64) * 3 + kind) * N)[:, None] + n[None, :]
        total += tl.sum(
            tl.load(pointers, mask=(part < parts)[:, None] & (n < N)[None, :], other=0.0), 0
        )
    tl.store(gradient + n, total.to(gradient.dtype.element_ty), mask=n < N)


def _strides(t) -> tuple | None:
    """Of the last four dimensions, 0 along those that are missing or of size 1."""
    if t is None:
        return None
    own = [s if n > 1 else 0 for n, s in zip(t.shape, t.stride(), strict=True)]
    return tuple([0] * (4 - len(own)) + own)


def _flat_stride(shape, strides) -> int | None:
    """The one stride between neighbouring rows, or None where there is none."""
    step, inner = 0, 1
    for n, s in zip(reversed(shape[:-1]), reversed(strides[4 - len(shape) : 3]), strict=True):
        if n == 1:
            continue
        if inner == 1:
            step = s
        elif s != inner * step:
            return None
        inner *= n
    return step


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class _Plan:
    """What the kernels of one call share: features, strides, the sizes of leading dimensions."""

    def __init__(self, x, rows: dict, x_bias, weight, bias, rms, dropout_p, total: bool):
        self.N = x.shape[-1]
        self.M = x.numel() // self.N if self.N else 0
        strides = {name: _strides(t) for name, t in rows.items()}
        flat = {n: _flat_stride(x.shape, s) for n, s in strides.items() if s is not None}
        even = all(s is not None for s in flat.values())
        if even:
            strides |= {n: (0, 0, s, strides[n][3]) for n, s in flat.items()}
        self.strides = strides
        sizes = [1] * (4 - x.dim()) + list(x.shape)
        self.sizes = (sizes[1], sizes[2])
        self.threshold = min(65535, int(dropout_p * 65536 + 0.5))
        self.keep_scale = 65536 / (65536 - self.threshold)
        block = max(8, min(_next_power_of_2(self.N), ELEMENTS))
        reach = max((s[3] for s in strides.values() if s), default=1)
        self.features = NormFeatures(
            BLOCK_M=max(1, min(ELEMENTS // 2 // block, _next_power_of_2(self.M))),
            BLOCK_N=block,
            ONE=block >= self.N,
            FLAT=even,
            WIDE=max(1, reach) * self.N >= 2**31 - block,
            RMS=rms,
            DROPOUT=self.threshold > 0,
            RESIDUAL=rows.get("residual") is not None,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            X_BIAS=x_bias is not None,
            TOTAL=total,
        )
        self.weights = tuple(0 if t is None else t.stride(0) for t in (weight, bias, x_bias))

    def warps(self, f: NormFeatures) -> int:
        return max(1, min(8, f.BLOCK_M * f.BLOCK_N // 512))


def forward_calls(arch, out, total, stats, x, residual, weight, bias, x_bias, seed,
                  eps, dropout_p, rms, prenorm, wide):  # fmt: skip
    """The kernel calls of one forward."""
    plan = _Plan(x, {"x": x, "residual": residual}, x_bias, weight, bias, rms, dropout_p, prenorm)
    f = plan.features
    args = (
        out, total, stats, x, residual, weight, bias, x_bias, seed,
        plan.strides["x"], plan.strides["residual"], *plan.weights,
        plan.M, plan.N, *plan.sizes, eps, plan.threshold, plan.keep_scale,
    )  # fmt: skip
    yield Call(add_norm_fwd_kernel, (triton.cdiv(plan.M, f.BLOCK_M),), args, f, plan.warps(f), 2)


def backward_calls(arch, dx, dresidual, dweight, dbias, dx_bias, x, stats, dout, dtotal, residual,
                   weight, bias, x_bias, seed, dropout_p, rms, need):  # fmt: skip
    """The kernel calls of one backward."""
    rows = {"x": x, "dout": dout, "dtotal": dtotal, "residual": residual}
    plan = _Plan(x, rows, x_bias, weight, None, rms, dropout_p, dtotal is not None)
    f = replace(plan.features, DOUT=dout is not None, NEED=need)
    M, N = plan.M, plan.N
    means = stats.new_empty((2, M) if need & 16 else 0, dtype=torch.float32)
    strides = (*(plan.strides[name] for name in rows), plan.weights[0], plan.weights[2])
    inputs = (x, stats, dout, dtotal, residual, weight, x_bias, seed, *strides)
    dropout = (plan.threshold, plan.keep_scale)
    if need & (1 | 2 | 16):
        # A backward row keeps three tiles alive where the forward keeps one.
        f = replace(f, BLOCK_M=max(1, f.BLOCK_M // 2))
        args = (dx, dresidual, means, *inputs, M, N, *plan.sizes, *dropout)
        warps = max(1, min(16, f.BLOCK_M * f.BLOCK_N // 256))
        yield Call(add_norm_rows_kernel, (triton.cdiv(M, f.BLOCK_M),), args, f, warps, 2)
    if not need & (4 | 8 | 16):
        return
    width = 1024 if arch == "interpreter" else 128
    f = replace(f, BLOCK_M=16, BLOCK_N=max(8, min(width, _next_power_of_2(N))), ONE=False)
    part_rows = triton.cdiv(triton.cdiv(M, PARTS), f.BLOCK_M) * f.BLOCK_M
    parts, blocks = triton.cdiv(M, part_rows), triton.cdiv(N, f.BLOCK_N)
    partials = stats.new_empty((parts, 3, N), dtype=torch.float32)
    args = (partials, means, *inputs, M, N, *plan.sizes, part_rows, *dropout)
    yield Call(add_norm_columns_kernel, (parts * blocks,), args, f, 4, 2)
    f = replace(f, BLOCK_M=32)
    for kind, gradient in enumerate((dweight, dbias, dx_bias)):
        if need >> (2 + kind) & 1:
            args = (gradient, partials, parts, kind, N)
            yield Call(add_norm_finish_kernel, (blocks,), args, f, 4, 2)


def add_norm_fwd(out, total, stats, x, *rest):
    """Fill out, total (where prenorm) and stats [2, M] (mean, rstd) or [1, M] (rstd)."""
    if x.numel() == 0:
        stats.zero_()
        return
    for call in forward_calls(device_arch(x.device), out, total, stats, x, *rest):
        call.run()


def add_norm_bwd(dx, dresidual, dweight, dbias, dx_bias, x, *rest):
    """Fill the gradients asked for by need: dx 1, dresidual 2, dweight 4, dbias 8, dx_bias 16."""
    if x.numel() == 0:
        for gradient in (dweight, dbias, dx_bias):
            gradient.zero_()
        return
    for call in backward_calls(
        device_arch(x.device), dx, dresidual, dweight, dbias, dx_bias, x, *rest
    ):
        call.run()
