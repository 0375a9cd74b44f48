"""Attention to a long cache in Triton, split over the keys, and the append to the cache.

    out = softmax(softcap(scale * q k^T) + position bias) v

A program takes one split of the keys of one key head and a tile of the query rows that share it;
a second kernel adds up the splits in their order. Lengths and pages may be anything: positions
outside the cache and pages that do not exist are neither read nor written.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from .common import (
    LOG2E,
    any_nonfinite,
    exponential,
    nonfinite_reaching,
    tanh,
    zero_nonfinite,
)
from .launch import Call, device_arch, dot_precision
from .plan import _broadcast_strides, _next_power_of_2, expand_table_kernel

MOST_SPLITS = 128
# Bytes of a row of the cache -> most rows of queries, keys of a step, warps.
_TILES = {128: (64, 64, 4), 256: (32, 64, 4), 512: (32, 32, 8), 1024: (16, 16, 4)}


@dataclass(frozen=True)
class Features:
    """Everything the decoding kernels are specialized on; passed as one constexpr."""

    D: int  # head size of query and key, and of value
    DV: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    PRECISION: str  # of dots on fp32 operands: "ieee" or "tf32"
    PAGE: int = 0  # positions of a page, 0: the cache is not paged
    START: bool = False
    HAS_LEFT: bool = False
    HAS_RIGHT: bool = False
    ONE: bool = False  # a tile holds rows of one query position alone
    HIDES: bool = False  # rows of a tile may see different keys
    BIAS: str = "none"  # "alibi", "alibi_positions", "table"
    SOFTCAP: bool = False
    NATURAL: bool = False  # logits in natural units, else in units of log2
    DIRECT: bool = False  # one split: the output itself is written


@triton.jit
def _cache_rows(base, stride, j, valid, owner, table, pages, F: tl.constexpr):
    """Pointers to positions j of one head of a cache and which of them exist."""
    if F.PAGE > 0:
        block = tl.load(table[0] + (j // F.PAGE).to(tl.int64) * table[1], mask=valid, other=-1)
        valid = valid & (block >= 0) & (block < pages)
        block = tl.where(valid, block, 0)
        rows = block.to(tl.int64) * stride[0] + (j % F.PAGE).to(tl.int64) * stride[2]
    else:
        rows = owner * stride[0] + j.to(tl.int64) * stride[2]
    return base + rows, valid


@triton.jit
def _load(rows, valid, stride, width: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    inside = valid[:, None] & (d < width)[None, :]
    return tl.load(rows[:, None] + d.to(tl.int64)[None, :] * stride, mask=inside, other=0.0)


@triton.jit
def _step(acc, total, peak, q, first, end, spans, keys, values, k_stride, v_stride, owner, table,
          pages, place, scale, cap, bias, reach, F: tl.constexpr, SAFE: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """One step of the online softmax over COLUMNS keys.

    SAFE keeps NaN and Inf of values from rows that do not see them.
    """
    j = first + tl.arange(0, COLUMNS)
    k_rows, valid = _cache_rows(keys, k_stride, j, j < end, owner, table, pages, F)
    k = _load(k_rows, valid, k_stride[3], F.D, F.BLOCK_D)
    x = tl.dot(q, tl.trans(k), input_precision=F.PRECISION) * scale
    if F.SOFTCAP:
        x = tanh(x) * cap
    if F.BIAS == "alibi":
        x += bias[0][:, None] * (j[None, :] - place[:, None]).to(tl.float32)
    elif F.BIAS == "alibi_positions":
        at = tl.load(bias[1] + j.to(tl.int64) * bias[2], mask=valid, other=0.0)
        x += bias[0][:, None] * at[None, :]
    elif F.BIAS == "table":
        away = tl.minimum(tl.maximum(j[None, :] - place[:, None], -reach), reach) + reach
        x += tl.load(bias[1] + bias[0][:, None] * (2 * reach + 1) + away)
    visible = valid[None, :] & (j[None, :] >= spans[0][:, None]) & (j[None, :] < spans[1][:, None])
    x = tl.where(visible, x, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(x, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = exponential(x - shift[:, None], F)
    decay = exponential(peak - shift, F)
    total = total * decay + tl.sum(p, 1)
    v_rows, valid = _cache_rows(values, v_stride, j, j < end, owner, table, pages, F)
    v = _load(v_rows, valid, v_stride[3], F.DV, F.BLOCK_DV)
    acc = acc * decay[:, None]
    if SAFE:
        acc += nonfinite_reaching(visible, v, F)
        v = zero_nonfinite(v)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=F.PRECISION)
    return acc, total, new_peak


@triton.jit(
    do_not_specialize=[
        "heads", "kv_heads", "S", "T", "pages", "splits", "tiles", "left", "right", "reach",
    ]
)  # fmt: skip
def attention_decode_kernel(
    out, peaks, totals, q, k, v, lengths, start, block_table, slopes, positions, diagonals,
    out_stride, q_stride, k_stride, v_stride, table_stride, slope_stride, position_stride,
    heads, kv_heads, S, T, pages, splits, tiles, scale, cap, left, right, reach,
    F: tl.constexpr,
):  # fmt: skip
    """out [rows, splits, DV], peaks and totals [rows, splits] of the splits, rows = B * heads * S
    in that order; with DIRECT the op's own out, through its strides."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits % tiles
    pair = program // splits // tiles
    batch = (pair // kv_heads).to(tl.int64)
    g = pair % kv_heads
    group = heads // kv_heads
    length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), T)
    r = tl.arange(0, F.BLOCK_M)
    if F.ONE:
        r += tile // S * F.BLOCK_M
        inside = r < group
        r = tl.where(inside, r, 0)
        head = (g * group + r).to(tl.int64)
        i = r * 0 + tile % S
    else:
        r += tile * F.BLOCK_M
        inside = r < group * S
        r = tl.where(inside, r, 0)
        head = (g * group + r // S).to(tl.int64)
        i = r % S
    place = length - S + i
    low = tl.zeros([BLOCK_M], tl.int32)
    high = low + length
    if F.START:
        low += tl.maximum(tl.load(start + batch), 0)
    if F.HAS_LEFT:
        low = tl.maximum(low, place - left)
    if F.HAS_RIGHT:
        high = tl.minimum(high, place + right + 1)
    seen = inside & (place >= 0)
    low = tl.where(seen, low, T)
    high = tl.where(seen, high, 0)
    first = tl.min(low, 0)
    count = tl.maximum(tl.max(high, 0) - first, 0)
    each = tl.cdiv(tl.cdiv(count, splits), F.BLOCK_N) * F.BLOCK_N
    begin = first + tl.minimum(split * each, count)
    end = first + tl.minimum(split * each + each, count)

    keys = k + g.to(tl.int64) * k_stride[1]
    values = v + g.to(tl.int64) * v_stride[1]
    table = (None, 0)
    if F.PAGE > 0:
        table = (block_table + batch * table_stride[0], table_stride[1])
    bias = (None, None, 0)
    if F.BIAS == "table":
        bias = (head, diagonals, 0)
    elif F.BIAS != "none":
        slope = tl.load(slopes + batch * slope_stride[0] + head * slope_stride[1])
        if not F.NATURAL:
            slope = slope * LOG2E
        bias = (slope, None, 0)
        if F.BIAS == "alibi_positions":
            bias = (slope, positions + batch * position_stride[0], position_stride[1])
    q_rows = q + batch * q_stride[0] + head * q_stride[1] + i.to(tl.int64) * q_stride[2]
    queries = _load(q_rows, inside, q_stride[3], F.D, F.BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for at in range(begin, end, F.BLOCK_N):
        acc, total, peak = _step(
            acc, total, peak, queries, at, end, (low, high), keys, values, k_stride, v_stride,
            batch, table, pages, place, scale, cap, bias, reach, F, False, F.BLOCK_N)  # fmt: skip
    poisoned = False
    if F.HIDES:
        poisoned = any_nonfinite(acc)
    if poisoned:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for at in tl.range(begin, end, 16, num_stages=1):
            acc, total, peak = _step(
                acc, total, peak, queries, at, end, (low, high), keys, values, k_stride, v_stride,
                batch, table, pages, place, scale, cap, bias, reach, F, True, 16)  # fmt: skip

    d = tl.arange(0, F.BLOCK_DV)
    written = inside[:, None] & (d < F.DV)[None, :]
    if F.DIRECT:
        total = tl.where(total == 0.0, 1.0, total)
        to = out + batch * out_stride[0] + head * out_stride[1] + i.to(tl.int64) * out_stride[2]
        to = to[:, None] + d.to(tl.int64)[None, :] * out_stride[3]
        tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=written)
    else:
        slot = ((batch * heads + head) * S + i) * splits + split
        tl.store(out + slot[:, None] * F.DV + d[None, :], acc, mask=written)
        tl.store(peaks + slot, peak, mask=inside)
        tl.store(totals + slot, total, mask=inside)


@triton.jit(do_not_specialize=["heads", "S", "splits"])
def attention_decode_combine_kernel(
    out, out_stride, parts, peaks, totals, heads, S, splits, F: tl.constexpr
):
    """One row: its splits added up in their order."""
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, F.BLOCK_N)
    peak = tl.max(tl.load(peaks + row * splits + s, mask=s < splits, other=float("-inf")), 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    d = tl.arange(0, F.BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = 0.0
    for split in range(splits):
        slot = row * splits + split
        weight = exponential(tl.load(peaks + slot) - shift, F)
        total += weight * tl.load(totals + slot)
        acc += weight * tl.load(parts + slot * F.DV + d, mask=d < F.DV, other=0.0)
    total = tl.where(total == 0.0, 1.0, total)
    batch = row // (heads * S)
    head = row // S % heads
    to = out + batch * out_stride[0] + head * out_stride[1] + row % S * out_stride[2]
    to += d.to(tl.int64) * out_stride[3]
    tl.store(to, (acc / total).to(out.dtype.element_ty), mask=d < F.DV)


@triton.jit(do_not_specialize=["heads", "S", "T", "pages"])
def cache_append_kernel(
    k_cache, v_cache, k, v, lengths, block_table, k_cache_stride, v_cache_stride, k_stride,
    v_stride, table_stride, heads, S, T, pages, F: tl.constexpr,
):  # fmt: skip
    """One token of one head."""
    program = tl.program_id(0)
    g = (program % heads).to(tl.int64)
    s = program // heads % S
    batch = (program // heads // S).to(tl.int64)
    at = tl.load(lengths + batch) - S + s
    valid = (at >= 0) & (at < T)
    owner = batch
    if F.PAGE > 0:
        entry = batch * table_stride[0] + (at // F.PAGE).to(tl.int64) * table_stride[1]
        block = tl.load(block_table + entry, mask=valid, other=-1)
        valid = valid & (block >= 0) & (block < pages)
        owner = tl.where(valid, block, 0).to(tl.int64)
        at = at % F.PAGE
    at = tl.where(valid, at, 0).to(tl.int64)
    token = s.to(tl.int64)
    d = tl.arange(0, F.BLOCK_D).to(tl.int64)
    new = k + batch * k_stride[0] + g * k_stride[1] + token * k_stride[2]
    to = k_cache + owner * k_cache_stride[0] + g * k_cache_stride[1] + at * k_cache_stride[2]
    kept = (d < F.D) & valid
    tl.store(to + d * k_cache_stride[3], tl.load(new + d * k_stride[3], mask=kept), mask=kept)
    d = tl.arange(0, F.BLOCK_DV).to(tl.int64)
    new = v + batch * v_stride[0] + g * v_stride[1] + token * v_stride[2]
    to = v_cache + owner * v_cache_stride[0] + g * v_cache_stride[1] + at * v_cache_stride[2]
    kept = (d < F.DV) & valid
    tl.store(to + d * v_cache_stride[3], tl.load(new + d * v_stride[3], mask=kept), mask=kept)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _splits(device: torch.device, programs: int, T: int, block: int) -> int:
    """Enough programs for two on every multiprocessor, each with two blocks of keys at least."""
    wanted = 2 * (_multiprocessors(device.index or 0) if device.type == "cuda" else 8)
    return max(1, min(wanted // max(1, programs), -(-T // (2 * block)), MOST_SPLITS))


def decode_calls(arch, out, q, k_cache, v_cache, lengths, start, block_table, slopes, positions,
                 table, lut, scale, softcap, left, right, splits=None):  # fmt: skip
    """The kernel calls of one attention to a cache."""
    B, H, S, D = q.shape
    pages, G, page, DV = v_cache.shape
    T = page if block_table is None else block_table.shape[1] * page
    group = H // max(1, G)
    # fp32 dots fill the registers: nothing is left for the path that keeps hidden NaN out.
    single = q.dtype == torch.float32
    row_bytes = max(_next_power_of_2(D), _next_power_of_2(DV)) * q.element_size()
    most_rows, block_n, num_warps = _TILES[min(max(row_bytes, 512 if single else 128), 1024)]
    rows = group if single else group * S
    block_m = max(16, min(most_rows, _next_power_of_2(rows)))
    tiles = -(-rows // block_m) * (S if single else 1)
    if splits is None:
        splits = _splits(q.device, B * G * tiles, T, block_n)
    natural = q.dtype == torch.float32
    unit = 1.0 if natural else 1.4426950408889634
    bias = "none"
    if slopes is not None:
        bias = "alibi" if positions is None else "alibi_positions"
    features = Features(
        D=D,
        DV=DV,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, _next_power_of_2(D)),
        BLOCK_DV=max(16, _next_power_of_2(DV)),
        PRECISION=dot_precision() if q.dtype == torch.float32 else "ieee",
        PAGE=0 if block_table is None else page,
        START=start is not None,
        HAS_LEFT=left >= 0,
        HAS_RIGHT=right >= 0,
        ONE=single,
        HIDES=S > 1 and not single,
        BIAS="table" if table is not None else bias,
        SOFTCAP=softcap > 0,
        NATURAL=natural,
        DIRECT=splits == 1,
    )
    diagonals, reach = None, 0
    if table is not None:
        count = lut.numel()
        reach = count // 2
        diagonals = torch.empty(H, count, dtype=torch.float32, device=q.device)
        arguments = (diagonals, table, lut.contiguous(), table.stride(), H, count, unit)
        grid = (H * -(-count // 256),)
        yield Call(expand_table_kernel, grid, arguments, replace(features, BLOCK_N=256), 4, 1)
    parts, peaks, totals = out, None, None
    if splits > 1:
        parts, peaks, totals = (
            torch.empty(B * H * S * splits * n, dtype=torch.float32, device=q.device)
            for n in (DV, 1, 1)
        )
    arguments = (
        *(parts, peaks, totals, q, k_cache, v_cache, lengths.contiguous()),
        *(None if start is None else start.contiguous(), block_table, slopes, positions, diagonals),
        *(out.stride(), q.stride(), k_cache.stride(), v_cache.stride()),
        (0, 0) if block_table is None else block_table.stride(),
        (0, 0) if slopes is None else _broadcast_strides(slopes, 2),
        (0, 0) if positions is None else _broadcast_strides(positions, 2),
        *(H, max(1, G), S, T, pages, splits, tiles),
        scale / softcap if softcap > 0 else scale * unit,
        softcap * unit,
        *(min(max(left, 0), T), min(max(right, 0), T), reach),
    )
    grid = (B * G * tiles * splits if DV else 0,)
    yield Call(attention_decode_kernel, grid, arguments, features, num_warps, 2)
    if splits > 1:
        arguments = (out, out.stride(), parts, peaks, totals, H, S, splits)
        features = replace(features, BLOCK_N=_next_power_of_2(splits))
        yield Call(attention_decode_combine_kernel, (B * H * S,), arguments, features, 1, 1)


def append_calls(k_cache, v_cache, k, v, lengths, block_table):
    """The kernel call of one append."""
    B, G, S, D = k.shape
    pages, _, page, DV = v_cache.shape
    features = Features(
        D=D,
        DV=DV,
        BLOCK_M=16,
        BLOCK_N=16,
        BLOCK_D=_next_power_of_2(D),
        BLOCK_DV=_next_power_of_2(DV),
        PRECISION="ieee",
        PAGE=0 if block_table is None else page,
    )
    arguments = (
        *(k_cache, v_cache, k, v, lengths.contiguous(), block_table),
        *(k_cache.stride(), v_cache.stride(), k.stride(), v.stride()),
        (0, 0) if block_table is None else block_table.stride(),
        *(G, S, page if block_table is None else block_table.shape[1] * page, pages),
    )
    yield Call(cache_append_kernel, (B * G * S,), arguments, features, 1, 1)


def attention_decode_fwd(out, q, *args):
    """Fill out [B, H, S, Dv]."""
    for call in decode_calls(device_arch(q.device), out, q, *args):
        call.run()


def cache_append_inplace(k_cache, v_cache, k, v, lengths, block_table):
    """Write the new tokens into both caches."""
    for call in append_calls(k_cache, v_cache, k, v, lengths, block_table):
        call.run()
