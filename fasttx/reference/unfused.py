"""linear, ffn, rope, cross_entropy and linear_cross_entropy by PyTorch's own operations, without
fusing anything: cuBLASLt's speed on a GPU, and a backend, "torch", where that was measured to be
faster (fasttx/choice.py).

The calling conventions are those of fasttx/ops; ffn without dropout, losses without the z-loss.
"""

import contextlib

import torch

from . import cross_entropy as reference
from .linear import activate
from .linear_cross_entropy import headroom
from .rope import each, turned

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
def plain(x):
    """Neither autocast nor autograd."""
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        yield


def _product(x, weight, bias, out=None):
    """x weight^T + bias."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def linear_fwd(out, pre, x, weight, bias, residual, activation, keep):
    with plain(x):
        before = _product(x, weight, bias, out=pre if keep else out)
        if activation or residual is not None:
            after = activate(before, activation)
            out.copy_(after if residual is None else after.add(residual))
        elif keep:
            out.copy_(before)


def linear_bwd(dx, dweight, dbias, x, weight, pre, dout, activation, need):
    with plain(x):
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
    with plain(x):
        h = activate(_product(x, w1, b1, out=pre if keep else None), activation)
        if w_gate is not None:
            h = h * _product(x, w_gate, b_gate, out=pre_gate if keep else None)
        _product(h, w2, b2, out=out)


def ffn_bwd(
    dx, dw1, db1, dw2, db2, dw_gate, db_gate, x, pre, pre_gate, dout, w1, b1, w2, w_gate, b_gate,
    seed, activation, hidden_dropout_p, dropout_p, need,
):  # fmt: skip
    with plain(x):
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


def cross_entropy_fwd(
    loss, peak, log_sum, norm, logits, target, weight, ignore_index, reduction, label_smoothing,
    z_loss,
):  # fmt: skip
    wide, V = loss.dtype, logits.shape[-1]
    with plain(logits):
        x = logits.reshape(-1, V)
        used, bad, safe = reference.targets(target, V, ignore_index)
        logs = torch.log_softmax(x, -1, dtype=wide)
        peak.copy_(x.amax(-1))
        torch.neg(logs.amax(-1), out=log_sum)
        norm.copy_(reference.normalisation(target, weight, ignore_index, reduction, wide))
        rows = torch.nn.functional.nll_loss(logs, safe, weight, reduction="none")
        if label_smoothing:
            spread = logs.sum(-1) if weight is None else logs @ weight
            rows = (1 - label_smoothing) * rows - label_smoothing / V * spread
        loss.copy_(reference.total(rows * norm[0], used, bad, reduction))


def cross_entropy_bwd(
    dlogits, dloss, logits, target, weight, peak, log_sum, norm, ignore_index, reduction,
    label_smoothing, z_loss,
):  # fmt: skip
    V = logits.shape[-1]
    with plain(logits):
        used, bad, safe = reference.targets(target, V, ignore_index)
        up = torch.where(used, dloss * norm[0], 0).masked_fill(bad, torch.nan)
        share = up * (label_smoothing / V)
        fall = up * (1 - label_smoothing) * (1 if weight is None else weight[safe])
        d = dlogits.view(-1, V)
        torch.ops.aten._softmax.out(logits.reshape(-1, V), -1, False, out=d)
        d.mul_((fall + share * (V if weight is None else weight.sum()))[:, None])
        if label_smoothing:
            d.sub_(share[:, None] if weight is None else share[:, None] * weight)
        d.scatter_add_(1, safe[:, None], -fall[:, None].to(d.dtype))
        # NaN of a row that is ignored.
        if d.is_cuda:
            d.masked_fill_(~used[:, None], 0)
        else:
            d.index_fill_(0, (~used).nonzero()[:, 0], 0)


def linear_cross_entropy_fwd(loss, dx, dweight, dbias, x, weight, bias, target, *args):
    *args, need = args
    _linear_cross_entropy(loss, (dx, dweight, dbias), None, x, weight, bias, target, args, need)


def linear_cross_entropy_bwd(dx, dweight, dbias, dloss, x, weight, bias, target, *args):
    *args, need = args
    loss = torch.empty_like(dloss)
    _linear_cross_entropy(loss, (dx, dweight, dbias), dloss, x, weight, bias, target, args, need)


def _linear_cross_entropy(loss, grads, dloss, x, weight, bias, target, args, need):
    """loss, and the gradients at dloss, None for the forward's own."""
    with plain(x):
        x = x.masked_fill((target == args[1])[:, None], 0)  # NaN of a row that is ignored
        logits = _product(x, weight, bias)
        residuals = [loss.new_empty(target.shape) for _ in range(2)] + [loss.new_empty(2)]
        cross_entropy_fwd(loss, *residuals, logits, target, *args)
        if not need:
            return
        if dloss is None:
            dloss = loss.new_full((), headroom(x, args[2]))
        d = torch.empty_like(logits)
        cross_entropy_bwd(d, dloss, logits, target, args[0], *residuals, *args[1:])
        dx, dweight, dbias = grads
        if need & 1:
            torch.mm(d, weight, out=dx)
        if need & 2:
            torch.mm(d.t(), x, out=dweight)
        if need & 4:
            torch.sum(d, 0, out=dbias)


def _rotate(out, x, cos, sin, rotary, interleaved, adjoint):
    """x cos + turned(x) sin as transformers writes it, in x's dtype; out may be x."""
    cos, sin = (each(t, rotary, interleaved, t.dtype) for t in (cos, sin))
    head, to = x[..., :rotary], out[..., :rotary]
    other = -turned(head * sin, interleaved) if adjoint else turned(head, interleaved) * sin
    if out is x:
        to.mul_(cos)
    else:
        torch.mul(head, cos, out=to)
        out[..., rotary:].copy_(x[..., rotary:])
    to.add_(other)


def _rotate_both(outputs, inputs, rest, adjoint):
    with plain(inputs[0]):
        for out, x in zip(outputs, inputs, strict=True):
            if x is not None:
                _rotate(out, x, *rest, adjoint)


def rope_fwd(q_out, k_out, q, k, *rest):
    _rotate_both((q_out, k_out), (q, k), rest, False)


def rope_bwd(dq, dk, dq_out, dk_out, *rest):
    _rotate_both((dq, dk), (dq_out, dk_out), rest, True)


def rope_inplace(q, k, *rest):
    _rotate_both((q, k), (q, k), rest, False)
