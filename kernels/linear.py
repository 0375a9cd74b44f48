"""act(x W^T + bias) + residual in Triton, forward and backward; what follows the product is its
epilogue. The arguments are those of fasttx/ops/linear.py."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import dropout_keep
from .gemm import (
    activate,
    dropout_key,
    features_of,
    load_tile,
    pick_tile,
    power_of_2_from,
    product_calls,
    products,
    store_tile,
    sum_calls,
    tile_of,
)
from .launch import Call, device_arch

PARTS = 256  # row ranges that are summed apart, at most


@triton.jit
def _with_bias(acc, bias, stride, n, N, THERE: tl.constexpr):
    if THERE:
        row = tl.load(bias + n.to(tl.int64) * stride, mask=n < N, other=0.0)
        return acc + row.to(tl.float32)[None, :]
    else:
        return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def linear_fwd_kernel(
    out, pre, pre_gate, x, weight, bias, gate, gate_bias, residual, seed, x_stride, weight_stride,
    bias_stride, gate_stride, gate_bias_stride, residual_stride, M, N, K, threshold, keep_scale,
    F: tl.constexpr,
):  # fmt: skip
    """out = dropout(act(x W^T + bias) [(x gate^T + gate_bias)]) + residual, one tile."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    first_m, first_n = tile_of(tl.program_id(0), M, N, F)
    begin = first_m * 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other = acc
    acc, other = products(
        acc, other, x, x_stride, weight, (weight_stride[1], weight_stride[0]), gate,
        (gate_stride[1], gate_stride[0]), first_m, first_n, M, N, begin, K, F, F.GATE,
    )  # fmt: skip
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    live = (m < M)[:, None] & (n < N)[None, :]
    stride = (N, 1)
    acc = _with_bias(acc, bias, bias_stride, n, N, F.BIAS)
    if F.KEEP:
        store_tile(pre, stride, m, n, acc, live)
    value, _ = activate(acc, F)
    if F.GATE:
        other = _with_bias(other, gate_bias, gate_bias_stride, n, N, F.GATE_BIAS)
        if F.KEEP:
            store_tile(pre_gate, stride, m, n, other, live)
        value = value * other
    if F.DROPOUT:
        keep = dropout_keep(first_m, first_n, dropout_key(seed, threshold, F), BLOCK_M, BLOCK_N)
        value = tl.where(keep, value * keep_scale, 0.0)
    if F.RESIDUAL:
        value += load_tile(residual, residual_stride, m, n, live)
    store_tile(out, stride, m, n, value, live)


@dataclass(frozen=True)
class RowFeatures:
    """What the kernel of upstream gradients is specialized on."""

    BLOCK_M: int
    BLOCK_N: int
    ACTIVATION: int
    DROPOUT: bool
    PLACE: int
    WRITE: bool
    SUMS: bool


@triton.jit(do_not_specialize=["M", "part_rows", "threshold"])
def linear_dpre_kernel(
    dpre, partials, pre, dout, seed, pre_stride, dout_stride, M, N, part_rows, threshold,
    keep_scale, F: tl.constexpr,
):  # fmt: skip
    """dpre = dout act'(pre), or dout where dropout keeps it (not scaled), and partials [parts, N]
    fp32: sums of it (scaled) over one part's rows, for BLOCK_N columns."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    blocks = tl.cdiv(N, BLOCK_N)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    first_n = (tl.program_id(0) % blocks) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for offset in range(0, part_rows, BLOCK_M):
        first_m = part * part_rows + offset
        m = first_m + tl.arange(0, BLOCK_M)
        live = (m < M)[:, None] & (n < N)[None, :]
        d = load_tile(dout, dout_stride, m, n, live)
        if F.DROPOUT:
            keep = dropout_keep(first_m, first_n, dropout_key(seed, threshold, F), BLOCK_M, BLOCK_N)
            d = tl.where(keep, d, 0.0)
        if F.ACTIVATION > 0:
            _, slope = activate(load_tile(pre, pre_stride, m, n, live), F)
            d = d * slope
        if F.WRITE:
            store_tile(dpre, (N, 1), m, n, d, live)
        if F.SUMS:
            total += d
    if F.SUMS:
        tl.store(partials + part * N + n, tl.sum(total, 0) * keep_scale, mask=n < N)


def threshold_of(dropout_p: float) -> int:
    return min(65535, int(dropout_p * 65536 + 0.5))


def forward_calls(arch, out, pre, pre_gate, x, weight, bias, gate, gate_bias, residual, seed,
                  activation, dropout_p, place, keep):  # fmt: skip
    """The call of one product with its epilogue; gate, gate_bias, pre_gate and seed are ffn's."""
    (M, K), N = x.shape, weight.shape[0]
    threshold = threshold_of(dropout_p)
    kind = "gate" if gate is not None else "epilogue" if activation or threshold else "plain"
    operands = (x, weight) if gate is None else (x, weight, gate)
    tile = pick_tile(kind, arch, N, operands)
    features = features_of(
        tile, K, operands, ACTIVATION=activation, BIAS=bias is not None, GATE=gate is not None,
        GATE_BIAS=gate_bias is not None, RESIDUAL=residual is not None, DROPOUT=threshold > 0,
        PLACE=place, KEEP=keep,
    )  # fmt: skip
    strides = (
        x.stride(),
        weight.stride(),
        0 if bias is None else bias.stride(0),
        (0, 0) if gate is None else gate.stride(),
        0 if gate_bias is None else gate_bias.stride(0),
        (0, 0) if residual is None else residual.stride(),
    )
    tensors = (out, pre, pre_gate, x, weight, bias, gate, gate_bias, residual, seed)
    args = (*tensors, *strides, M, N, K, threshold, 65536 / (65536 - threshold))
    grid = (triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1]),)
    yield Call(linear_fwd_kernel, grid, args, features, *tile[3:])


def dpre_calls(arch, dpre, sums, pre, dout, seed=None, activation=0, dropout_p=0.0, place=0):
    """dpre [M, N] (or None) and sums [N] over its rows (or None)."""
    M, N = dout.shape
    threshold = threshold_of(dropout_p)
    block_m, block_n = (16, 256) if arch == "interpreter" else (16, 128)
    features = RowFeatures(
        BLOCK_M=block_m,
        BLOCK_N=min(block_n, power_of_2_from(N, 16)),
        ACTIVATION=activation,
        DROPOUT=threshold > 0,
        PLACE=place,
        WRITE=dpre is not None,
        SUMS=sums is not None,
    )
    part_rows = max(1, triton.cdiv(triton.cdiv(M, PARTS), block_m)) * block_m
    parts = triton.cdiv(M, part_rows)
    partials = None
    if sums is not None:
        partials = dout.new_empty((parts, N), dtype=torch.float32)
    strides = ((0, 0) if pre is None else pre.stride(), dout.stride())
    scale = 65536 / (65536 - threshold)
    args = (dpre, partials, pre, dout, seed, *strides, M, N, part_rows, threshold, scale)
    grid = (parts * triton.cdiv(N, features.BLOCK_N),)
    yield Call(linear_dpre_kernel, grid, args, features, 4, 1)
    if sums is not None:
        yield from sum_calls(sums, partials, parts)


def backward_calls(arch, dx, dweight, dbias, x, weight, pre, dout, activation, need):
    dpre, sums = dout, dbias if need & 4 else None
    if activation or sums is not None:
        written = None
        if activation and need & 3:
            dpre = written = dout.new_empty(dout.shape)
        yield from dpre_calls(arch, written, sums, pre, dout, activation=activation)
    if need & 2:
        yield from product_calls(arch, dweight, [(dpre.t(), x)])
    if need & 1:
        yield from product_calls(arch, dx, [(dpre, weight)])


def linear_fwd(out, pre, x, weight, bias, residual, activation, keep):
    """Fill out and, where keep, pre."""
    for call in forward_calls(
        device_arch(x.device), out, pre, None, x, weight, bias, None, None, residual, None,
        activation, 0.0, 0, keep,
    ):  # fmt: skip
        call.run()


def linear_bwd(dx, dweight, dbias, x, *rest):
    """Fill the gradients asked for by need: dx 1, dweight 2, dbias 4."""
    for call in backward_calls(device_arch(x.device), dx, dweight, dbias, x, *rest):
        call.run()
