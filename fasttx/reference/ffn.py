"""The feed-forward layer in plain PyTorch.

`ffn_math` is differentiable to any order; `ffn_fwd` and `ffn_bwd` are the backend, with the calling
convention of fasttx/ops/ffn.py. Everything in fp32, in fp64 for fp64 inputs.
"""

import math

import torch
from torch import Tensor

from .linear import activate, product, slope
from .philox import dropout_threshold, philox_mask

HIDDEN, OUTPUT = 0, 1


def _dropout(t: Tensor, seed: Tensor | None, p: float, place: int) -> Tensor:
    """t [..., N] with the bits of its flattened rows, under head `place`."""
    if not dropout_threshold(p):
        return t
    keep = philox_mask(seed, p, 1, place + 1, math.prod(t.shape[:-1]), t.shape[-1])[0, place]
    scale = 65536 / (65536 - dropout_threshold(p))
    return torch.where(keep.view(t.shape), t * scale, 0)


def _factors(x, w1, b1, w_gate, b_gate):
    return product(x, w1, b1), None if w_gate is None else product(x, w_gate, b_gate)


def _hidden(pre, gate, activation):
    h = activate(pre, activation)
    return h if gate is None else h * gate


def ffn_math(
    x, w1, b1, w2, b2, w_gate, b_gate, seed, activation, hidden_dropout_p, dropout_p, keep,
    compute=None,
):  # fmt: skip
    """(out, pre, pre_gate), differentiable; the arguments of ffn_fwd, x of any dimensions.
    compute: the dtype of every step, fp32 where None (fp64 for fp64)."""
    dtype = compute or torch.promote_types(x.dtype, torch.float32)
    pre, gate = _factors(x.to(dtype), w1, b1, w_gate, b_gate)
    h = _dropout(_hidden(pre, gate, activation), seed, hidden_dropout_p, HIDDEN)
    out = _dropout(product(h, w2, b2), seed, dropout_p, OUTPUT)
    nothing = pre.new_empty(0)
    return out, pre if keep else nothing, gate if keep and gate is not None else nothing


def ffn_fwd(out, pre, pre_gate, x, *args):
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        for result, value in zip((out, pre, pre_gate), ffn_math(x, *args), strict=True):
            result.copy_(value)


def ffn_bwd(
    dx, dw1, db1, dw2, db2, dw_gate, db_gate, x, pre, pre_gate, dout, w1, b1, w2, w_gate, b_gate,
    seed, activation, hidden_dropout_p, dropout_p, need,
):  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        x = x.to(wide)
        if pre is None:
            pre, gate = _factors(x, w1, b1, w_gate, b_gate)
        else:
            pre, gate = pre.to(wide), None if pre_gate is None else pre_gate.to(wide)
        g = _dropout(dout.to(wide), seed, dropout_p, OUTPUT)
        dh = _dropout(g @ w2.to(wide), seed, hidden_dropout_p, HIDDEN)
        dpre = dh * slope(pre, activation)
        dgate = None
        if gate is not None:
            dpre, dgate = dpre * gate, dh * activate(pre, activation)

        def hidden():
            return _dropout(_hidden(pre, gate, activation), seed, hidden_dropout_p, HIDDEN)

        def input_gradient():
            d = dpre @ w1.to(wide)
            return d if dgate is None else d + dgate @ w_gate.to(wide)

        grads = (
            input_gradient,
            lambda: dpre.mT @ x,
            lambda: dpre.sum(0),
            lambda: g.mT @ hidden(),
            lambda: g.sum(0),
            lambda: dgate.mT @ x,
            lambda: dgate.sum(0),
        )
        outputs = (dx, dw1, db1, dw2, db2, dw_gate, db_gate)
        for bit, (result, value) in enumerate(zip(outputs, grads, strict=True)):
            if need >> bit & 1:
                result.copy_(value())
