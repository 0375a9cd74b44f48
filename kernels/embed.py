"""dropout(norm(scale * token + position + segment row)) in Triton, forward and backward.

A program of the row kernels holds BLOCK_M rows by BLOCK_N columns: all columns where they fit
(ONE), else it goes over them several times. The gradient of a table sums the rows of dz by id,
without atomics: in the stable order of the ids, each chunk of CHUNK rows sums its runs of one id;
what such a run has in several chunks is added in order by a second kernel.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from .add_norm import (
    ELEMENTS,
    PARTS,
    _columns,
    _kept,
    _next_power_of_2,
    _parameter,
    _statistics,
    _store,
    add_norm_finish_kernel,
)
from .launch import Call, device_arch

CHUNK = 32  # rows of dz, in the order of their ids, that one program sums


@dataclass(frozen=True)
class EmbedFeatures:
    """Everything a kernel is specialized on; passed as one constexpr."""

    BLOCK_M: int
    BLOCK_N: int
    ONE: bool  # a block holds all columns
    WIDE: bool  # offsets along a row can pass 2^31
    NORM: bool
    RMS: bool
    DROPOUT: bool
    POSITION: bool
    POSITION_IDS: bool
    SEGMENT: bool
    SEGMENT_IDS: bool
    WEIGHT: bool
    BIAS: bool
    CHUNK: int = CHUNK
    NEED: int = 0  # tables 1, 2, 4, dnorm_weight 8, dnorm_bias 16


@triton.jit
def _ids(ids, m, M, start, S, F: tl.constexpr):
    """Of the three tables, for rows m."""
    token, position, segment = ids
    inside = m < M
    t = tl.load(token + m, mask=inside, other=0)
    p = start + m % S
    if F.POSITION_IDS:
        p = tl.load(position + m, mask=inside, other=0)
    s = m * 0
    if F.SEGMENT_IDS:
        s = tl.load(segment + m, mask=inside, other=0)
    return t, p, s


@triton.jit
def _gather(table, stride, rows, ids, n, live):
    """table[ids, n] as fp32, NaN where an id is out of range."""
    known = ((ids >= 0) & (ids < rows))[:, None]
    pointers = table + ((ids * stride[0])[:, None] + (n * stride[1])[None, :])
    x = tl.load(pointers, mask=live & known, other=0.0).to(tl.float32)
    return tl.where(known, x, float("nan"))


@triton.jit
def _sum(tables, strides, rows, ids, n, live, scale, F: tl.constexpr):
    """scale * token + position + segment of one tile, zero where not live."""
    z = _gather(tables[0], strides[0], rows[0], ids[0], n, live) * scale
    if F.POSITION:
        z += _gather(tables[1], strides[1], rows[1], ids[1], n, live)
    if F.SEGMENT:
        z += _gather(tables[2], strides[2], rows[2], ids[2], n, live)
    return tl.where(live, z, 0.0)


@triton.jit
def _drop(value, dropout, first, start, F: tl.constexpr):
    if F.DROPOUT:
        seed, threshold, keep_scale = dropout
        return tl.where(_kept(first, start, seed, threshold, F), value * keep_scale, 0.0)
    else:
        return value


@triton.jit
def _normalized(z, mean, rstd, weight, bias, n, N, F: tl.constexpr):
    y = (z - mean[:, None]) * rstd[:, None]
    if F.WEIGHT:
        y *= _parameter(weight[0], weight[1], n, N)
    if F.BIAS:
        y += _parameter(bias[0], bias[1], n, N)
    return y


@triton.jit(do_not_specialize=["M", "S", "start", "threshold"])
def embed_fwd_kernel(
    out, stats, tables, strides, rows, norm_weight, norm_bias, ids, seed, M, N, S, start, scale,
    eps, threshold, keep_scale, F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None]
    which = _ids(ids, m, M, start, S, F)
    dropout = (seed, threshold, keep_scale)
    mean = tl.zeros([BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    if not F.NORM:
        for begin in range(0, N, BLOCK_N):
            n = _columns(begin, F)
            live = inside & (n < N)[None, :]
            z = _sum(tables, strides, rows, which, n, live, scale, F)
            _store(out, m, n, N, _drop(z, dropout, first, begin, F), live)
    elif F.ONE:
        n = _columns(0, F)
        live = inside & (n < N)[None, :]
        z = _sum(tables, strides, rows, which, n, live, scale, F)
        if not F.RMS:
            mean = tl.sum(z, 1) / N
        centered = tl.where(live, z - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / N + eps)
        y = _normalized(z, mean, rstd, norm_weight, norm_bias, n, N, F)
        _store(out, m, n, N, _drop(y, dropout, first, 0, F), live)
    else:
        if not F.RMS:
            for begin in range(0, N, BLOCK_N):
                n = _columns(begin, F)
                live = inside & (n < N)[None, :]
                mean += tl.sum(_sum(tables, strides, rows, which, n, live, scale, F), 1)
            mean = mean / N
        for begin in range(0, N, BLOCK_N):
            n = _columns(begin, F)
            live = inside & (n < N)[None, :]
            z = _sum(tables, strides, rows, which, n, live, scale, F)
            centered = tl.where(live, z - mean[:, None], 0.0)
            square += tl.sum(centered * centered, 1)
        rstd = 1.0 / tl.sqrt(square / N + eps)
        for begin in range(0, N, BLOCK_N):
            n = _columns(begin, F)
            live = inside & (n < N)[None, :]
            z = _sum(tables, strides, rows, which, n, live, scale, F)
            y = _normalized(z, mean, rstd, norm_weight, norm_bias, n, N, F)
            _store(out, m, n, N, _drop(y, dropout, first, begin, F), live)
    if F.NORM:
        if F.RMS:
            tl.store(stats + m, rstd, mask=m < M)
        else:
            tl.store(stats + m, mean, mask=m < M)
            tl.store(stats + M + m, rstd, mask=m < M)


@triton.jit
def _upstream(dout, stride, S, dropout, first, begin, m, n, live, F: tl.constexpr):
    """dropout's gradient of one tile, zero where not live."""
    rows = m // S * stride[0] + m % S * stride[1]
    pointers = dout + (rows[:, None] + (n * stride[2])[None, :])
    g = tl.load(pointers, mask=live, other=0.0).to(tl.float32)
    return tl.where(live, _drop(g, dropout, first, begin, F), 0.0)


@triton.jit
def _tile(inputs, dout, dropout, weight, mean, rstd, first, begin, m, n, live, N, S, scale,
          F: tl.constexpr):  # fmt: skip
    """(xhat, g, g * weight) of one tile, zero where not live."""
    tables, strides, rows, which = inputs
    z = _sum(tables, strides, rows, which, n, live, scale, F)
    xhat = tl.where(live, (z - mean[:, None]) * rstd[:, None], 0.0)
    g = _upstream(dout[0], dout[1], S, dropout, first, begin, m, n, live, F)
    gw = g
    if F.WEIGHT:
        gw = g * _parameter(weight[0], weight[1], n, N)
    return xhat, g, gw


@triton.jit(do_not_specialize=["M", "S", "start", "threshold"])
def embed_rows_kernel(
    dz, stats, dout, tables, strides, rows, norm_weight, ids, seed, M, N, S, start, scale,
    threshold, keep_scale, F: tl.constexpr,
):  # fmt: skip
    """dz [M, N] fp32, the gradient of the sum of the tables' rows, of BLOCK_M rows."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None]
    dropout = (seed, threshold, keep_scale)
    if not F.NORM:
        for begin in range(0, N, BLOCK_N):
            n = _columns(begin, F)
            live = inside & (n < N)[None, :]
            g = _upstream(dout[0], dout[1], S, dropout, first, begin, m, n, live, F)
            _store(dz, m, n, N, g, live)
    else:
        mean, rstd = _statistics(stats, m, M, F)
        inputs = (tables, strides, rows, _ids(ids, m, M, start, S, F))
        along = tl.zeros([BLOCK_M], tl.float32)
        across = tl.zeros([BLOCK_M], tl.float32)
        if F.ONE:
            n = _columns(0, F)
            live = inside & (n < N)[None, :]
            xhat, _, gw = _tile(inputs, dout, dropout, norm_weight, mean, rstd, first, 0, m, n,
                                live, N, S, scale, F)  # fmt: skip
            if not F.RMS:
                along = tl.sum(gw, 1) / N
            across = tl.sum(gw * xhat, 1) / N
            d = (gw - along[:, None] - xhat * across[:, None]) * rstd[:, None]
            _store(dz, m, n, N, d, live)
        else:
            for begin in range(0, N, BLOCK_N):
                n = _columns(begin, F)
                live = inside & (n < N)[None, :]
                xhat, _, gw = _tile(inputs, dout, dropout, norm_weight, mean, rstd, first, begin,
                                    m, n, live, N, S, scale, F)  # fmt: skip
                if not F.RMS:
                    along += tl.sum(gw, 1)
                across += tl.sum(gw * xhat, 1)
            along = along / N
            across = across / N
            for begin in range(0, N, BLOCK_N):
                n = _columns(begin, F)
                live = inside & (n < N)[None, :]
                xhat, _, gw = _tile(inputs, dout, dropout, norm_weight, mean, rstd, first, begin,
                                    m, n, live, N, S, scale, F)  # fmt: skip
                d = (gw - along[:, None] - xhat * across[:, None]) * rstd[:, None]
                _store(dz, m, n, N, d, live)


@triton.jit(do_not_specialize=["M", "S", "start", "part_rows", "threshold"])
def embed_columns_kernel(
    partials, stats, dout, tables, strides, rows, norm_weight, ids, seed, M, N, S, start, scale,
    part_rows, threshold, keep_scale, F: tl.constexpr,
):  # fmt: skip
    """partials [parts, 3, N] fp32: the gradients of norm_weight and norm_bias summed over one
    part's rows, for BLOCK_N columns."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    blocks = tl.cdiv(N, BLOCK_N)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks) * BLOCK_N
    n = _columns(begin, F)
    dropout = (seed, threshold, keep_scale)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for offset in range(0, part_rows, BLOCK_M):
        first = part * part_rows + offset
        m = first + tl.arange(0, BLOCK_M)
        live = (m < M)[:, None] & (n < N)[None, :]
        mean, rstd = _statistics(stats, m, M, F)
        inputs = (tables, strides, rows, _ids(ids, m, M, start, S, F))
        xhat, g, _ = _tile(inputs, dout, dropout, norm_weight, mean, rstd, first, begin, m, n,
                           live, N, S, scale, F)  # fmt: skip
        dweight += g * xhat
        dbias += g
    base = partials + part * 3 * N + n
    if F.NEED & 8:
        tl.store(base, tl.sum(dweight, 0), mask=n < N)
    if F.NEED & 16:
        tl.store(base + N, tl.sum(dbias, 0), mask=n < N)


@triton.jit
def _joined(ids, i, M):
    """Whether entry i has the id of the entry before it."""
    inside = (i > 0) & (i < M)
    here = tl.load(ids + i, mask=inside, other=0)
    return inside & (tl.load(ids + i - 1, mask=inside, other=-1) == here)


@triton.jit(do_not_specialize=["M", "S", "rows"])
def embed_runs_kernel(
    gradient, partials, dz, stride, order, ids, M, N, S, rows, scale, F: tl.constexpr
):
    """One chunk and BLOCK_N columns. ids are sorted, order says which row of dz they are. A run
    that began before the chunk goes to partials [chunks, 2, N] at 0, one that goes on after it to
    1, any other to its row of the gradient."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    blocks = tl.cdiv(N, BLOCK_N)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    n = _columns((tl.program_id(0) % blocks) * BLOCK_N, F)
    inside = n < N
    first = chunk * F.CHUNK
    opened = _joined(ids, first, M)
    total = tl.zeros([BLOCK_N], tl.float32)
    for offset in range(F.CHUNK):
        i = first + offset
        exists = i < M
        row = tl.load(order + i, mask=exists, other=0)
        id = tl.load(ids + i, mask=exists, other=0)
        pointers = dz + (row // S * stride[0] + row % S * stride[1]) + n * stride[2]
        total += tl.load(pointers, mask=inside & exists, other=0.0).to(tl.float32)
        goes_on = _joined(ids, i + 1, M)
        ends = exists & ((goes_on == 0) | (offset == F.CHUNK - 1))
        tl.store(partials + chunk * 2 * N + n, total, mask=inside & ends & opened)
        tl.store(
            partials + (chunk * 2 + 1) * N + n, total,
            mask=inside & ends & goes_on & (opened == 0),
        )  # fmt: skip
        whole = ends & (goes_on == 0) & (opened == 0) & (id < rows)
        value = (total * scale).to(gradient.dtype.element_ty)
        tl.store(gradient + id * N + n, value, mask=inside & whole)
        total = tl.where(ends, 0.0, total)
        opened = opened & (ends == 0)


@triton.jit(do_not_specialize=["M", "rows"])
def embed_join_kernel(gradient, partials, ids, M, N, rows, scale, F: tl.constexpr):
    """The run that began in one chunk and goes on after it, for BLOCK_N columns."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    blocks = tl.cdiv(N, BLOCK_N)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    n = _columns((tl.program_id(0) % blocks) * BLOCK_N, F)
    inside = n < N
    first = chunk * F.CHUNK
    end = tl.minimum(first + F.CHUNK, M)
    id = tl.load(ids + end - 1)
    before = _joined(ids, first, M) & (tl.load(ids + first) == id)
    more = _joined(ids, end, M)
    begins = more & (before == 0) & (id < rows)
    last = chunk
    if begins:
        while more:
            last += 1
            end = tl.minimum((last + 1) * F.CHUNK, M)
            more = _joined(ids, end, M) & (tl.load(ids + end - 1) == id)
    total = tl.load(partials + (chunk * 2 + 1) * N + n, mask=inside & begins, other=0.0)
    for k in range(chunk + 1, last + 1):
        total += tl.load(partials + k * 2 * N + n, mask=inside, other=0.0)
    value = (total * scale).to(gradient.dtype.element_ty)
    tl.store(gradient + id * N + n, value, mask=inside & begins)


class _Plan:
    """What the kernels of one call share: features and arguments."""

    def __init__(self, weights, ids, start, norm, scale, dropout_p, reach=1):
        token, position, segment, norm_weight, norm_bias = weights
        input_ids, segment_ids, position_ids, seed = ids
        self.N = token.shape[1]
        self.M, self.S = input_ids.numel(), input_ids.shape[1]
        self.tables = (token, position, segment)
        self.strides = tuple(None if t is None else t.stride() for t in self.tables)
        self.rows = tuple(None if t is None else t.shape[0] for t in self.tables)
        self.ids = (input_ids, position_ids, segment_ids)
        self.weight, self.bias = (
            None if t is None else (t, t.stride(0)) for t in (norm_weight, norm_bias)
        )
        self.threshold = min(65535, int(dropout_p * 65536 + 0.5))
        self.dropout = (self.threshold, 65536 / (65536 - self.threshold))
        self.place = (start, scale)
        self.seed = seed
        block = max(8, min(_next_power_of_2(self.N), ELEMENTS))
        reach = max(reach, *(s[1] for s in self.strides if s))
        self.features = EmbedFeatures(
            BLOCK_M=max(1, min(ELEMENTS // 2 // block, _next_power_of_2(self.M))),
            BLOCK_N=block,
            ONE=block >= self.N,
            WIDE=max(1, reach) * self.N >= 2**31 - block,
            NORM=norm > 0,
            RMS=norm == 2,
            DROPOUT=self.threshold > 0,
            POSITION=position is not None,
            POSITION_IDS=position_ids is not None,
            SEGMENT=segment is not None,
            SEGMENT_IDS=segment_ids is not None,
            WEIGHT=norm_weight is not None,
            BIAS=norm_bias is not None,
        )


def _warps(f: EmbedFeatures, elements: int) -> int:
    return max(1, min(16, f.BLOCK_M * f.BLOCK_N // elements))


def forward_calls(arch, out, stats, token_weight, position_weight, segment_weight, norm_weight,
                  norm_bias, input_ids, segment_ids, position_ids, seed, start, padding_idx,
                  position_padding, norm, scale, eps, dropout_p, wide):  # fmt: skip
    """The kernel calls of one forward."""
    weights = (token_weight, position_weight, segment_weight, norm_weight, norm_bias)
    ids = (input_ids, segment_ids, position_ids, seed)
    p = _Plan(weights, ids, start, norm, scale, dropout_p)
    f = p.features
    args = (
        out, stats, p.tables, p.strides, p.rows, p.weight, p.bias, p.ids, seed, p.M, p.N, p.S,
        *p.place, eps, *p.dropout,
    )  # fmt: skip
    grid = (triton.cdiv(p.M, f.BLOCK_M),)
    yield Call(embed_fwd_kernel, grid, args, f, _warps(f, 512), 2)


def backward_calls(arch, gradients, weights, stats, dout, input_ids, segment_ids, position_ids,
                   seed, start, padding_idx, position_padding, norm, scale, dropout_p,
                   need):  # fmt: skip
    """The kernel calls of one backward; gradients: dtoken, dposition, dsegment, dnorm_weight,
    dnorm_bias."""
    ids = (input_ids, segment_ids, position_ids, seed)
    p = _Plan(weights, ids, start, norm, scale, dropout_p, dout.stride(2))
    f, M, N, S = replace(p.features, NEED=need), p.M, p.N, p.S
    shared = (stats, (dout, dout.stride()), p.tables, p.strides, p.rows, p.weight, p.ids, seed)
    sizes = (M, N, S, *p.place)
    dz, stride = dout, dout.stride()
    if need & 7 and (f.NORM or f.DROPOUT):
        dz, stride = dout.new_empty((M, N), dtype=torch.float32), (S * N, N, 1)
        f = replace(f, BLOCK_M=max(1, f.BLOCK_M // 2))
        grid = (triton.cdiv(M, f.BLOCK_M),)
        args = (dz, *shared, *sizes, *p.dropout)
        yield Call(embed_rows_kernel, grid, args, f, _warps(f, 256), 2)
    width = 1024 if arch == "interpreter" else 128
    f = replace(f, BLOCK_N=max(8, min(width, _next_power_of_2(N))), ONE=False)
    blocks = triton.cdiv(N, f.BLOCK_N)
    for which, padding in enumerate((padding_idx, position_padding, -1)):
        if need >> which & 1:
            gradient = gradients[which]
            gradient.zero_()
            order, sorted_ids = _sorted(p, which, padding, start)
            chunks = triton.cdiv(M, CHUNK)
            partials = dout.new_empty((chunks, 2, N), dtype=torch.float32)
            factor = scale if which == 0 else 1.0
            one = replace(f, BLOCK_M=1)
            args = (gradient, partials, dz, stride, order, sorted_ids, M, N, S, p.rows[which])
            yield Call(embed_runs_kernel, (chunks * blocks,), (*args, factor), one, 4, 2)
            args = (gradient, partials, sorted_ids, M, N, p.rows[which], factor)
            yield Call(embed_join_kernel, (chunks * blocks,), args, one, 4, 2)
    if need & 24:
        f = replace(f, BLOCK_M=16)
        part_rows = triton.cdiv(triton.cdiv(M, PARTS), f.BLOCK_M) * f.BLOCK_M
        parts = triton.cdiv(M, part_rows)
        partials = dout.new_empty((parts, 3, N), dtype=torch.float32)
        args = (partials, *shared, *sizes, part_rows, *p.dropout)
        yield Call(embed_columns_kernel, (parts * blocks,), args, f, 4, 2)
        f = replace(f, BLOCK_M=32)
        for kind in (0, 1):
            if need >> (3 + kind) & 1:
                args = (gradients[3 + kind], partials, parts, kind, N)
                yield Call(add_norm_finish_kernel, (blocks,), args, f, 4, 2)


def _sorted(p: _Plan, which: int, padding: int, start: int):
    """(order, ids) of a table's ids, stable; those that get no gradient last, as p.rows."""
    ids, shape = p.ids[which], p.ids[0].shape
    if ids is None:
        ids = p.ids[0].new_zeros(shape)
        if which == 1:
            ids = torch.arange(start, start + p.S, device=ids.device).expand(shape)
    ids = ids.reshape(-1)
    ids = torch.where((ids < 0) | (ids == padding), p.rows[which], ids).clamp(max=p.rows[which])
    ids, order = torch.sort(ids, stable=True)
    return order, ids


def embed_fwd(out, stats, token_weight, *rest):
    """Fill out and stats [2, M] (mean, rstd), [1, M] (rstd) or [0, M]."""
    if out.numel() == 0:
        stats.zero_()
        return
    for call in forward_calls(device_arch(out.device), out, stats, token_weight, *rest):
        call.run()


def embed_bwd(dtoken, dposition, dsegment, dnorm_weight, dnorm_bias, token_weight, position_weight,
              segment_weight, norm_weight, norm_bias, stats, dout, *rest):  # fmt: skip
    """Fill the gradients asked for by need: tables 1, 2, 4, dnorm_weight 8, dnorm_bias 16."""
    gradients = (dtoken, dposition, dsegment, dnorm_weight, dnorm_bias)
    if dout.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    weights = (token_weight, position_weight, segment_weight, norm_weight, norm_bias)
    for call in backward_calls(device_arch(dout.device), gradients, weights, stats, dout, *rest):
        call.run()
