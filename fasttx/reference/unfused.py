"""linear and ffn by PyTorch's own products, in x's dtype and without fusing anything: cuBLASLt's
speed on a GPU, and a backend, "torch", where that was measured to be faster (fasttx/choices.json).

The calling conventions are those of fasttx/ops/linear.py and ffn.py; ffn without dropout.
"""

import contextlib

import torch

from .linear import activate

_gradients = {
    1: lambda g, pre: torch.ops.aten.gelu_backward(g, pre),
    2: lambda g, pre: torch.ops.aten.gelu_backward(g, pre, approximate="tanh"),
    3: lambda g, pre: torch.ops.aten.threshold_backward(g, pre, 0),
    4: lambda g, pre: torch.ops.aten.silu_backward(g, pre),
}


def _upstream(g, pre, activation):
    """g act'(pre)."""
    return _gradients[activation](g, pre) if activation else g


@contextlib.contextmanager
def _plain(x):
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        yield


def _product(x, weight, bias, out=None):
    """x weight^T + bias."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def linear_fwd(out, pre, x, weight, bias, residual, activation, keep):
    with _plain(x):
        before = _product(x, weight, bias, out=pre if keep else out)
        if activation or residual is not None:
            after = activate(before, activation)
            out.copy_(after if residual is None else after.add(residual))
        elif keep:
            out.copy_(before)


def linear_bwd(dx, dweight, dbias, x, weight, pre, dout, activation, need):
    with _plain(x):
        dpre = _upstream(dout, pre, activation)
        if need & 1:
            torch.mm(dpre, weight, out=dx)
        if need & 2:
            torch.mm(dpre.t(), x, out=dweight)
        if need & 4:
            torch.sum(dpre, 0, out=dbias)


def ffn_fwd(
    out, pre, pre_gate, x, w1, b1, w2, b2, w_gate, b_gate, seed, activation, hidden_dropout_p,
    dropout_p, keep,
):  # fmt: skip
    with _plain(x):
        h = activate(_product(x, w1, b1, out=pre if keep else None), activation)
        if w_gate is not None:
            h = h * _product(x, w_gate, b_gate, out=pre_gate if keep else None)
        _product(h, w2, b2, out=out)


def ffn_bwd(
    dx, dw1, db1, dw2, db2, dw_gate, db_gate, x, pre, pre_gate, dout, w1, b1, w2, w_gate, b_gate,
    seed, activation, hidden_dropout_p, dropout_p, need,
):  # fmt: skip
    with _plain(x):
        gated = w_gate is not None
        if pre is None:
            pre = _product(x, w1, b1)
            pre_gate = _product(x, w_gate, b_gate) if gated else None
        if need & ~24:
            dh = torch.mm(dout, w2)
        value = activate(pre, activation) if gated or need & 8 else None
        if need & 7:
            dpre = _upstream(dh * pre_gate if gated else dh, pre, activation)
        if gated and need & 97:
            dgate = dh * value
        if need & 1:
            torch.mm(dpre, w1, out=dx)
            if gated:
                dx.addmm_(dgate, w_gate)
        if need & 2:
            torch.mm(dpre.t(), x, out=dw1)
        if need & 4:
            torch.sum(dpre, 0, out=db1)
        if need & 8:
            torch.mm(dout.t(), value * pre_gate if gated else value, out=dw2)
        if need & 16:
            torch.sum(dout, 0, out=db2)
        if need & 32:
            torch.mm(dgate.t(), x, out=dw_gate)
        if need & 64:
            torch.sum(dgate, 0, out=db_gate)
