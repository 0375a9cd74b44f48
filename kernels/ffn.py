"""The feed-forward layer in Triton: two products with epilogues forward; backward one product that
makes the gradients of the hidden layer and the layer itself again, then plain products. The
arguments are those of fasttx/ops/ffn.py."""

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
    product_calls,
    products,
    store_tile,
    sum_calls,
    tile_of,
)
from .launch import Call, device_arch
from .linear import dpre_calls, forward_calls, threshold_of

HIDDEN, OUTPUT = 0, 1  # dropout's places


@triton.jit(do_not_specialize=["M", "threshold"])
def ffn_hidden_bwd_kernel(
    dpre, dgate, h, dpre_sums, dgate_sums, g, w2, pre, pre_gate, seed, g_stride, w2_stride,
    pre_stride, pre_gate_stride, M, N, K, scale, threshold, keep_scale, F: tl.constexpr,
):  # fmt: skip
    """One tile of dh = scale g w2, of which follow dpre, dgate and h; the sums [tiles of rows, N]
    are over the tile's rows."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    first_m, first_n = tile_of(tl.program_id(0), M, N, F)
    begin = first_m * 0
    dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dh, _ = products(dh, dh, g, g_stride, w2, w2_stride, w2, w2_stride, first_m, first_n, M, N,
                     begin, K, F, False)  # fmt: skip
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    live = (m < M)[:, None] & (n < N)[None, :]
    stride = (N, 1)
    value, slope = activate(load_tile(pre, pre_stride, m, n, live), F)
    dh = dh * scale
    if F.DROPOUT:
        keep = dropout_keep(first_m, first_n, dropout_key(seed, threshold, F), BLOCK_M, BLOCK_N)
        dh = tl.where(keep, dh * keep_scale, 0.0)
    d = dh * slope
    place = (first_m // BLOCK_M).to(tl.int64) * N + n
    if F.GATE:
        factor = load_tile(pre_gate, pre_gate_stride, m, n, live)
        d = d * factor
        if F.NEED & 18:
            beside = dh * value
            if F.NEED & 2:
                store_tile(dgate, stride, m, n, beside, live)
            if F.NEED & 16:
                tl.store(dgate_sums + place, tl.sum(beside, 0), mask=n < N)
        value = value * factor
    if F.NEED & 1:
        store_tile(dpre, stride, m, n, d, live)
    if F.NEED & 8:
        tl.store(dpre_sums + place, tl.sum(d, 0), mask=n < N)
    if F.NEED & 4:
        if F.DROPOUT:
            value = tl.where(keep, value * keep_scale, 0.0)
        store_tile(h, stride, m, n, value, live)


def ffn_forward_calls(arch, out, pre, pre_gate, x, w1, b1, w2, b2, w_gate, b_gate, seed, activation,
                      hidden_dropout_p, dropout_p, keep):  # fmt: skip
    h = x.new_empty((x.shape[0], w1.shape[0]))
    yield from forward_calls(
        arch, h, pre, pre_gate, x, w1, b1, w_gate, b_gate, None, seed, activation,
        hidden_dropout_p, HIDDEN, keep,
    )  # fmt: skip
    yield from forward_calls(
        arch, out, None, None, h, w2, b2, None, None, None, seed, 0, dropout_p, OUTPUT, False
    )


def _hidden_calls(arch, outputs, sums, g, scale, w2, pre, pre_gate, seed, activation, dropout_p):
    """outputs: dpre, dgate, h or None each; sums: of dpre and dgate over their rows, or None."""
    (M, K), N = g.shape, w2.shape[1]
    threshold = threshold_of(dropout_p)
    tile = pick_tile("hidden", arch, N, (g, w2))
    tiles_m = triton.cdiv(M, tile[0])
    partials = [None if t is None else g.new_empty((tiles_m, N), dtype=torch.float32) for t in sums]
    written = (*outputs, *partials)
    features = features_of(
        tile, K, (g, w2), ACTIVATION=activation, GATE=pre_gate is not None, DROPOUT=threshold > 0,
        PLACE=HIDDEN, NEED=sum(1 << i for i, t in enumerate(written) if t is not None),
    )  # fmt: skip
    strides = (
        *(t.stride() for t in (g, w2, pre)),
        (0, 0) if pre_gate is None else pre_gate.stride(),
    )
    args = (*written, g, w2, pre, pre_gate, seed, *strides, M, N, K, scale, threshold)
    grid = (tiles_m * triton.cdiv(N, tile[1]),)
    yield Call(
        ffn_hidden_bwd_kernel, grid, (*args, 65536 / (65536 - threshold)), features, *tile[3:]
    )
    for out, partial in zip(sums, partials, strict=True):
        if out is not None:
            yield from sum_calls(out, partial, tiles_m)


def ffn_backward_calls(arch, dx, dw1, db1, dw2, db2, dw_gate, db_gate, x, pre, pre_gate, dout, w1,
                       b1, w2, w_gate, b_gate, seed, activation, hidden_dropout_p, dropout_p,
                       need):  # fmt: skip
    M, hidden = x.shape[0], (x.shape[0], w1.shape[0])
    threshold = threshold_of(dropout_p)
    g, scale = dout, 65536 / (65536 - threshold)
    if threshold or need & 16:
        written = None
        if threshold:
            g = written = dout.new_empty(dout.shape)
        sums = db2 if need & 16 else None
        yield from dpre_calls(arch, written, sums, None, dout, seed, 0, dropout_p, OUTPUT)
    if not need & ~16:
        return
    if pre is None:
        pre = x.new_empty(hidden)
        nothing = (None, None, 0, 0.0, HIDDEN, False)
        yield from forward_calls(arch, pre, None, None, x, w1, b1, None, None, *nothing)
        if w_gate is not None:
            pre_gate = x.new_empty(hidden)
            yield from forward_calls(
                arch, pre_gate, None, None, x, w_gate, b_gate, None, None, *nothing
            )
    wanted = (need & 3, w_gate is not None and need & 33, need & 8)
    dpre, dgate, h = outputs = [x.new_empty(hidden) if n else None for n in wanted]
    sums = (db1 if need & 4 else None, db_gate if need & 64 else None)
    yield from _hidden_calls(
        arch, outputs, sums, g, scale, w2, pre, pre_gate, seed, activation, hidden_dropout_p
    )
    for bit, out, left, right, factor in (
        (2, dw1, dpre, x, 1.0),
        (8, dw2, g, h, scale),
        (32, dw_gate, dgate, x, 1.0),
    ):
        if need & bit:
            yield from product_calls(arch, out, [(left.t(), right)], factor)
    if need & 1 and M:
        terms = [(dpre, w1), *([] if dgate is None else [(dgate, w_gate)])]
        yield from product_calls(arch, dx, terms)


def ffn_fwd(out, pre, pre_gate, x, *rest):
    """Fill out and, where keep, pre and pre_gate."""
    for call in ffn_forward_calls(device_arch(x.device), out, pre, pre_gate, x, *rest):
        call.run()


def ffn_bwd(dx, dw1, db1, dw2, db2, dw_gate, db_gate, x, *rest):
    """Fill the gradients asked for by need: dx 1, dw1 2, db1 4, dw2 8, db2 16, dw_gate 32, db_gate
    64."""
    for call in ffn_backward_calls(
        device_arch(x.device), dx, dw1, db1, dw2, db2, dw_gate, db_gate, x, *rest
    ):
        call.run()
