"""Products of matrices in Triton: tiles, loops and sums that linear and ffn share.

c [M, N] = a [M, K] b [K, N] for operands of any strides, fp32 accumulators. Where tiles of c are
too few for the machine, K is split: parts are kept in fp32 and added up in order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import tanh
from .launch import Call, dot_precision

GROUP_M = tl.constexpr(8)  # tiles of rows that go together, so that the cache holds what they read
MOST_PARTS = 32

# Kernel -> architecture -> (block_m, block_n, block_k, num_warps, num_stages) for 16-bit operands:
# plain products, a forward epilogue with an activation or dropout, one with a gate (two
# accumulators), and the hidden layer's backward. The largest found to compile without spilling;
# none has been tuned by running.
TILES_16 = {
    "plain": {
        "sm80": (128, 128, 32, 8, 4),
        "sm90": (128, 256, 64, 8, 3),
        "sm100": (128, 256, 64, 8, 3),
        "gfx942": (128, 128, 64, 8, 2),
    },
    "epilogue": {
        "sm80": (128, 64, 32, 8, 4),
        "sm90": (128, 128, 64, 8, 3),
        "sm100": (128, 128, 64, 8, 3),
        "gfx942": (128, 128, 64, 8, 2),
    },
    "gate": {
        "sm80": (128, 64, 32, 8, 4),
        "sm90": (128, 64, 64, 8, 3),
        "sm100": (128, 64, 64, 8, 3),
        "gfx942": (128, 64, 64, 8, 2),
    },
    "hidden": {
        "sm80": (128, 64, 32, 8, 4),
        "sm90": (128, 64, 64, 8, 3),
        "sm100": (128, 64, 64, 8, 3),
        "gfx942": (128, 64, 64, 8, 2),
    },
}
# fp32 operands, on any architecture.
TILES_32 = {
    "plain": (64, 64, 16, 4, 2),
    "epilogue": (64, 64, 16, 4, 2),
    "gate": (64, 32, 16, 4, 2),
    "hidden": (64, 32, 16, 4, 2),
}
# 16-bit operands that cannot be loaded 16 bytes at a time, on any architecture: an address an
# element takes registers.
TILES_UNEVEN = {
    "plain": (64, 64, 32, 4, 2),
    "epilogue": (64, 64, 32, 4, 2),
    "gate": (64, 32, 32, 4, 2),
    "hidden": (64, 32, 32, 4, 2),
}
_LIKE = {"sm90": "sm90", "sm100": "sm100", "sm103": "sm100", "gfx90a": "gfx942", "gfx950": "gfx942"}
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}


@dataclass(frozen=True)
class GemmFeatures:
    """Everything a kernel with a product is specialized on; passed as one constexpr."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    PRECISION: str  # of dots on fp32 operands: "ieee" or "tf32"
    EVEN_K: bool  # K is a multiple of BLOCK_K
    WIDE: bool  # offsets inside a tile can pass 2^31
    ACTIVATION: int = 0  # 0 none, 1 gelu (erf), 2 gelu_tanh, 3 relu, 4 silu
    BIAS: bool = False
    GATE: bool = False
    GATE_BIAS: bool = False
    RESIDUAL: bool = False
    DROPOUT: bool = False
    PLACE: int = 0  # the head of dropout's counter: 0 the hidden layer, 1 the output
    KEEP: bool = False  # forward: store what the activation reads
    TWO: bool = False  # a second pair of operands is added
    NEED: int = 0  # hidden backward: dpre 1, dgate 2, h 4, sums of dpre 8, sums of dgate 16


@triton.jit
def tile_of(program, M, N, F: tl.constexpr):
    """First row and column of a program's tile: GROUP_M tiles of rows to a column of tiles."""
    tiles_m = tl.cdiv(M, F.BLOCK_M)
    width = GROUP_M * tl.cdiv(N, F.BLOCK_N)
    first = program // width * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    inside = program % width
    return (first + inside % rows) * F.BLOCK_M, inside // rows * F.BLOCK_N


@triton.jit
def _operand(base, stride_row, stride_column, rows, columns, first, along_columns: tl.constexpr,
             F: tl.constexpr):  # fmt: skip
    """Pointers to a tile; `first` is where its K axis begins."""
    if along_columns:
        base += first.to(tl.int64) * stride_column
        if F.WIDE:
            columns = columns.to(tl.int64)
        return base + (rows.to(tl.int64) * stride_row)[:, None] + (columns * stride_column)[None, :]
    else:
        base += first.to(tl.int64) * stride_row
        if F.WIDE:
            rows = rows.to(tl.int64)
        return base + (rows * stride_row)[:, None] + (columns.to(tl.int64) * stride_column)[None, :]


@triton.jit
def products(acc, other, a, a_stride, b, b_stride, c, c_stride, first_m, first_n, M, N, begin, end,
             F: tl.constexpr, TWO: tl.constexpr):  # fmt: skip
    """acc + a b over begin <= k < end, and with TWO other + a c, for one tile."""
    BLOCK_K: tl.constexpr = F.BLOCK_K
    m = first_m + tl.arange(0, F.BLOCK_M)
    n = first_n + tl.arange(0, F.BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live_m = (m < M)[:, None]
    live_n = (n < N)[None, :]
    step = tl.full([], BLOCK_K, tl.int64)
    a_at = _operand(a, a_stride[0], a_stride[1], m, k, begin, True, F)
    b_at = _operand(b, b_stride[0], b_stride[1], k, n, begin, False, F)
    if TWO:
        c_at = _operand(c, c_stride[0], c_stride[1], k, n, begin, False, F)
    for start in range(begin, end, BLOCK_K):
        if F.EVEN_K:
            left = tl.load(a_at, mask=live_m, other=0.0)
            right = tl.load(b_at, mask=live_n, other=0.0)
        else:
            live_k = k < end - start
            left = tl.load(a_at, mask=live_m & live_k[None, :], other=0.0)
            right = tl.load(b_at, mask=live_n & live_k[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=F.PRECISION)
        if TWO:
            if F.EVEN_K:
                right = tl.load(c_at, mask=live_n, other=0.0)
            else:
                right = tl.load(c_at, mask=live_n & live_k[:, None], other=0.0)
            other = tl.dot(left, right, other, input_precision=F.PRECISION)
            c_at += step * c_stride[0]
        a_at += step * a_stride[1]
        b_at += step * b_stride[0]
    return acc, other


@triton.jit
def activate(x, F: tl.constexpr):
    """(act(x), act'(x)) in fp32; what is not used is not computed."""
    if F.ACTIVATION == 1:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif F.ACTIVATION == 2:
        square = x * x
        t = tanh(0.7978845608028654 * (x + 0.044715 * square * x))
        rise = 0.7978845608028654 * (1.0 + 0.134145 * square)
        return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * rise
    elif F.ACTIVATION == 3:
        # NaN stays.
        return tl.where(x <= 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)
    elif F.ACTIVATION == 4:
        s = 1.0 / (1.0 + tl.exp(-x))
        return x * s, s * (1.0 + x * (1.0 - s))
    else:
        return x, 1.0


@triton.jit
def dropout_key(seed, threshold, F: tl.constexpr):
    """What `dropout_keep` needs."""
    key = tl.load(seed).to(tl.uint64)
    none = tl.zeros([], tl.uint32)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32), none + F.PLACE, none, threshold


@triton.jit
def load_tile(base, stride, m, n, live):
    """Any strides, as fp32, zero where not live."""
    at = (m.to(tl.int64) * stride[0])[:, None] + (n.to(tl.int64) * stride[1])[None, :]
    return tl.load(base + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def store_tile(base, stride, m, n, value, live):
    at = (m.to(tl.int64) * stride[0])[:, None] + (n.to(tl.int64) * stride[1])[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["parts", "steps"])
def product_kernel(
    out, a, b, a2, b2, out_stride, a_stride, b_stride, a2_stride, b2_stride, M, N, K, parts, steps,
    scale, F: tl.constexpr,
):  # fmt: skip
    """out = scale (a b [+ a2 b2]); of several parts out [parts, M, N] gets the one over
    `steps` blocks of k each."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    program = tl.program_id(0)
    part = program % parts
    first_m, first_n = tile_of(program // parts, M, N, F)
    begin = part * steps * F.BLOCK_K
    end = tl.minimum(begin + steps * F.BLOCK_K, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc, _ = products(acc, acc, a, a_stride, b, b_stride, b, b_stride, first_m, first_n, M, N,
                      begin, end, F, False)  # fmt: skip
    if F.TWO:
        acc, _ = products(acc, acc, a2, a2_stride, b2, b2_stride, b2, b2_stride, first_m, first_n,
                          M, N, begin, end, F, False)  # fmt: skip
    m = first_m + tl.arange(0, F.BLOCK_M)
    n = first_n + tl.arange(0, F.BLOCK_N)
    live = (m < M)[:, None] & (n < N)[None, :]
    store_tile(out + part.to(tl.int64) * M * N, out_stride, m, n, acc * scale, live)


@dataclass(frozen=True)
class SumFeatures:
    BLOCK_P: int
    BLOCK_N: int


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(out, partials, out_stride, parts, columns, count, F: tl.constexpr):
    """out, `count` elements in rows of `columns`, = the sum of its parts in order."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    place = tl.program_id(0).to(tl.int64) * F.BLOCK_N + tl.arange(0, F.BLOCK_N)
    live = place < count
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, parts, F.BLOCK_P):
        part = first + tl.arange(0, F.BLOCK_P)
        at = part.to(tl.int64)[:, None] * count + place[None, :]
        inside = (part < parts)[:, None] & live[None, :]
        total += tl.sum(tl.load(partials + at, mask=inside, other=0.0), 0)
    at = place // columns * out_stride[0] + place % columns * out_stride[1]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


def power_of_2_from(length: int, least: int) -> int:
    return max(least, 1 << max(length - 1, 0).bit_length())


def like(arch: str) -> str:
    """The architecture whose row of the tables serves."""
    return arch if arch in MULTIPROCESSORS else _LIKE.get(arch, "sm80")


def _even(t) -> bool:
    """Whether all rows, or columns, of t are whole pieces of 16 elements side by side."""
    return any(t.stride(i) == 1 and t.shape[i] % 16 == 0 == t.stride(1 - i) % 16 for i in (0, 1))


def pick_tile(kind: str, arch: str, N: int, operands: tuple) -> tuple:
    """The tile of a product [M, K] [K, N], the first and the last of its operands: (block_m,
    block_n, block_k, num_warps, num_stages), no larger than the problem and, where that can be,
    small enough to keep two thirds of the multiprocessors at work."""
    (M, K), itemsize = operands[0].shape, operands[0].element_size()
    if kind == "plain" and K % 64:  # checking k takes registers
        kind = "epilogue"
    if arch == "interpreter":
        block_m, block_n, block_k, warps, stages = 64, 64, 64, 4, 1
    elif itemsize == 4:
        block_m, block_n, block_k, warps, stages = TILES_32[kind]
    elif N % 16 or not all(map(_even, operands)):
        block_m, block_n, block_k, warps, stages = TILES_UNEVEN[kind]
    else:
        block_m, block_n, block_k, warps, stages = TILES_16[kind][like(arch)]
    block_m = min(block_m, power_of_2_from(M, 16))
    block_n = min(block_n, power_of_2_from(N, 16))
    block_k = min(block_k, power_of_2_from(K, 16))
    if arch != "interpreter":
        wanted = MULTIPROCESSORS[like(arch)]
        while block_n > 32 and 3 * triton.cdiv(M, block_m) * triton.cdiv(N, block_n) < 2 * wanted:
            if block_m > block_n:
                block_m //= 2
            else:
                block_n //= 2
    warps = max(4, min(warps, block_m * block_n // 1024))
    return block_m, block_n, block_k, warps, stages


def features_of(tile: tuple, K: int, operands: tuple, **more) -> GemmFeatures:
    fp32 = operands[0].dtype == torch.float32
    block_m, block_n, block_k, *_ = tile
    return GemmFeatures(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PRECISION=dot_precision() if fp32 else "ieee",
        EVEN_K=K % block_k == 0,
        WIDE=max((s for t in operands for s in t.stride()), default=0) >= 2**24,
        **more,
    )


def sum_calls(out, partials, parts: int):
    """out [rows, columns] or [columns] = partials [parts, ...] summed."""
    columns = out.shape[-1]
    stride = out.stride() if out.dim() == 2 else (0, out.stride(0))
    block_p = min(16, power_of_2_from(parts, 1))
    features = SumFeatures(BLOCK_P=block_p, BLOCK_N=1024 // block_p)
    grid = (triton.cdiv(out.numel(), features.BLOCK_N),)
    args = (out, partials, stride, parts, max(1, columns), out.numel())
    yield Call(sum_parts_kernel, grid, args, features, 4, 1)


def product_calls(arch, out, terms: list, scale: float = 1.0):
    """out [M, N] = scale * the sum of a b over terms, pairs (a [M, K], b [K, N]) of one shape, at
    most two. out may have any strides."""
    if out.stride(0) == 1 and out.stride(1) != 1:  # write along memory
        out, terms = out.t(), [(b.t(), a.t()) for a, b in terms]
    (M, N), K = out.shape, terms[0][0].shape[1]
    operands = tuple(t for pair in terms for t in pair)
    tile = pick_tile("plain", arch, N, operands)
    block_m, block_n, block_k, warps, stages = tile
    features = features_of(tile, K, operands, TWO=len(terms) == 2)
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    steps = triton.cdiv(K, block_k)
    wanted = 1 if arch == "interpreter" else MULTIPROCESSORS[like(arch)]
    parts = max(1, min(wanted // max(1, tiles), steps // 8, MOST_PARTS))
    each = triton.cdiv(steps, parts)
    parts = max(1, triton.cdiv(steps, max(1, each)))
    to, stride = out, out.stride()
    if parts > 1:
        to, stride = out.new_empty((parts, M, N), dtype=torch.float32), (N, 1)
    a, b = terms[0]
    a2, b2 = terms[-1]
    strides = (stride, a.stride(), b.stride(), a2.stride(), b2.stride())
    args = (to, a, b, a2, b2, *strides, M, N, K, parts, each, scale)
    yield Call(product_kernel, (tiles * parts,), args, features, warps, stages)
    if parts > 1:
        yield from sum_calls(out, to, parts)
