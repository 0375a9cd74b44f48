"""Sampling after temperature, top-k and top-p in Triton: one program a row, which goes over it from
the cache. The formulas of fasttx/ops/sample.py, whose integers every backend shares: the k-th
largest logit and the edge of top-p are found four bits at a time, from the highest.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .common import philox4x32
from .launch import Call

LIMIT = tl.constexpr(40.0 * 2**24)


@dataclass(frozen=True)
class SampleFeatures:
    """Everything the kernel is specialized on; passed as one constexpr."""

    BLOCK: int
    GREEDY: bool
    TOP_K: bool
    TOP_P: bool


@triton.jit
def _logits(base, stride, c, V):
    x = tl.load(base + c.to(tl.int64) * stride, mask=c < V, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def _mass(x, peak, factor):
    y = tl.minimum((peak - x) * factor, LIMIT)
    d = tl.where(x == peak, 0.0, y).to(tl.int32).to(tl.int64)
    f = d & 0xFFFFFF
    h = 19732394 - ((f * 2016033) >> 24)
    h = 118712301 - ((h * f) >> 24)
    h = 515765849 - ((h * f) >> 24)
    h = 1488511653 - ((h * f) >> 24)
    h = 2147483487 - ((h * f) >> 24)
    return (h << 7) >> (d >> 24)


@triton.jit
def _order(x):
    """int64 in the order of the floats, 0 .. 2^32 - 1."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _float(order):
    bits = (order - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _edge(base, stride, V, peak, factor, floor, target, MASS: tl.constexpr, F: tl.constexpr):
    """The largest logit such that those from it on, of the ones from floor on, weigh (MASS) or
    number at least target."""
    digits = tl.arange(0, 16)
    prefix = target * 0
    for level in range(8):
        shift = 28 - 4 * level
        found = tl.zeros([16], tl.int64)
        for first in range(0, V, F.BLOCK):
            c = first + tl.arange(0, F.BLOCK)
            x = _logits(base, stride, c, V)
            order = _order(x)
            used = (c < V) & (x >= floor) & ((order >> (shift + 4)) == prefix)
            if MASS:
                weight = tl.where(used, _mass(x, peak, factor), 0)
            else:
                weight = tl.where(used, 1, 0).to(tl.int64)
            digit = ((order >> shift) & 15)[:, None] == digits[None, :]
            found += tl.sum(tl.where(digit, weight[:, None], 0), 0)
        later = digits[:, None] >= digits[None, :]
        from_digit = tl.sum(tl.where(later, found[:, None], 0), 0)
        chosen = tl.max(tl.where(from_digit >= target, digits, 0), 0)
        target -= tl.sum(tl.where(digits > chosen, found, 0), 0)
        prefix = prefix * 16 + chosen
    return _float(prefix)


@triton.jit
def _total(base, stride, V, peak, factor, floor, F: tl.constexpr):
    BLOCK: tl.constexpr = F.BLOCK
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, V, F.BLOCK):
        x = _logits(base, stride, first + tl.arange(0, F.BLOCK), V)
        total += tl.where(x >= floor, _mass(x, peak, factor), 0)
    return tl.sum(total, 0)


@triton.jit
def _draw(base, stride, V, peak, factor, floor, seed, row, F: tl.constexpr):
    total = _total(base, stride, V, peak, factor, floor, F)
    key = tl.load(seed).to(tl.uint64)
    none = tl.zeros([], tl.uint32)
    w0, w1, _, _ = philox4x32(
        none, row.to(tl.uint32), none, none, key.to(tl.uint32), (key >> 32).to(tl.uint32)
    )
    bits = (w0.to(tl.int64) << 21) | (w1 >> 11).to(tl.int64)
    u = bits.to(tl.float64) * 1.1102230246251565e-16
    r = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
    before = total * 0
    id = total * 0
    for first in range(0, V, F.BLOCK):
        c = first + tl.arange(0, F.BLOCK)
        x = _logits(base, stride, c, V)
        weight = tl.where(x >= floor, _mass(x, peak, factor), 0)
        passed = before + tl.cumsum(weight, 0) <= r
        id += tl.sum(tl.where(passed & (c < V), 1, 0), 0)
        before += tl.sum(weight, 0)
    return id


@triton.jit(do_not_specialize=["V", "top_k"])
def sample_kernel(ids, logits, stride, seed, V, factor, top_k, top_p, F: tl.constexpr):
    BLOCK: tl.constexpr = F.BLOCK
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride[0]
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, V, F.BLOCK):
        x = _logits(base, stride[1], first + tl.arange(0, F.BLOCK), V)
        bad |= (x != x).to(tl.int32)
        highest = tl.maximum(highest, tl.where(x == x, x, float("-inf")))
    peak = tl.max(highest, 0)
    if (tl.max(bad, 0) > 0) | (peak == float("-inf")):
        tl.store(ids + row, -1)
    elif F.GREEDY:
        at = V
        for first in range(0, V, F.BLOCK):
            c = first + tl.arange(0, F.BLOCK)
            x = _logits(base, stride[1], c, V)
            at = tl.minimum(at, tl.min(tl.where((x == peak) & (c < V), c, V), 0))
        tl.store(ids + row, at.to(tl.int64))
    else:
        floor = tl.full([], float("-inf"), tl.float32)
        if F.TOP_K:
            target = tl.full([], top_k, tl.int64)
            floor = _edge(base, stride[1], V, peak, factor, floor, target, False, F)
        if F.TOP_P:
            total = _total(base, stride[1], V, peak, factor, floor, F)
            share = tl.full([], top_p, tl.float32).to(tl.float64)
            target = (share * total.to(tl.float64)).to(tl.int64)
            target = tl.minimum(tl.maximum(target, 1), total)
            floor = _edge(base, stride[1], V, peak, factor, floor, target, True, F)
        tl.store(ids + row, _draw(base, stride[1], V, peak, factor, floor, seed, row, F))


def sample_calls(ids, logits, seed, factor, top_k, top_p, greedy):
    """The kernel calls of one sampling."""
    rows, V = logits.shape
    block = max(16, min(512, triton.next_power_of_2(V)))
    features = SampleFeatures(block, bool(greedy), top_k > 0, top_p < 1)
    args = (ids, logits, logits.stride(), seed, V, factor, top_k, top_p)
    yield Call(sample_kernel, (rows,), args, features, max(1, block // 32), 2)


def sample_fwd(ids, logits, *args):
    """Fill ids [R]."""
    for call in sample_calls(ids, logits, *args):
        call.run()
