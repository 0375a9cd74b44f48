"""out = dropout(h w2^T + b2), h = dropout(act(x w1^T + b1) (x w_gate^T + b_gate)); without a gate
the second factor is 1.

Shapes, below the door: x [M, K], w1 and w_gate [F, K], w2 [N, F], b1 and b_gate [F], b2 [N], out
[M, N], all of one of float32, bfloat16, float16 and of any strides. Where `keep`, pre and pre_gate
[M, F] in x's dtype hold x w1^T + b1 and x w_gate^T + b_gate (0 elements otherwise, or without a
gate); h is computed before they are rounded, and is itself rounded to x's dtype. activation: as in
linear.

Dropout decides by (row, column): h's under counter (column // 8, row, 0, 0), the output's under
(column // 8, row, 1, 0), seed int64 [1] is the key of both (fasttx/reference/philox.py).

    g = dropout'(dout)             db2 = sum g                dw2 = g^T h
    dh = dropout'(g w2)            dpre = dh act'(pre) gate   dgate = dh act(pre)
    dw1 = dpre^T x                 dx = dpre w1 + dgate w_gate, and so on

need: dx 1, dw1 2, db1 4, dw2 8, db2 16, dw_gate 32, db_gate 64. Without pre the backward computes
pre and pre_gate again from x; h it computes again always. Gradients of weights have their strides
where these are dense. Sums are in float32 (float64 for float64) in a fixed order, and rounded
once.

Sources: Hendrycks and Gimpel, arXiv 1606.08415 (gelu); Shazeer, 2002.05202 (gates).
"""

import torch
from torch import Tensor

from ..autograd import differentiable
from ..op import Op
from ._checks import check_backend, check_dropout, check_float, seed_tensor
from .linear import (
    ACTIVATIONS,
    autocast,
    check_dtypes,
    check_like,
    check_shape,
    check_weight,
    rows,
    set_kernels,
    shaped_like,
    wants_gradient,
)

__all__ = ["ffn", "ffn_bwd", "ffn_fwd"]

_GATED = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "swiglu": "silu"}


@Op
def ffn_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    w_gate: Tensor | None, b_gate: Tensor | None, seed: Tensor | None,
    activation: int, hidden_dropout_p: float, dropout_p: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    M, hidden = x.shape[0], (x.shape[0], w1.shape[0])
    return (
        x.new_empty((M, w2.shape[0])),
        x.new_empty(hidden if keep else 0),
        x.new_empty(hidden if keep and w_gate is not None else 0),
    )


@Op
def ffn_bwd(
    x: Tensor, pre: Tensor | None, pre_gate: Tensor | None, dout: Tensor,
    w1: Tensor, b1: Tensor | None, w2: Tensor, w_gate: Tensor | None, b_gate: Tensor | None,
    seed: Tensor | None, activation: int, hidden_dropout_p: float, dropout_p: float, need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    F, N = w1.shape[0], w2.shape[0]
    return (
        x.new_empty(x.shape if need & 1 else 0),
        torch.empty_like(w1) if need & 2 else x.new_empty(0),
        x.new_empty(F if need & 4 else 0),
        torch.empty_like(w2) if need & 8 else x.new_empty(0),
        x.new_empty(N if need & 16 else 0),
        torch.empty_like(w_gate) if need & 32 else x.new_empty(0),
        x.new_empty(F if need & 64 else 0),
    )


ffn_fwd.backward = ffn_bwd
for _op in (ffn_fwd, ffn_bwd):
    set_kernels(
        _op,
        "ffn",
        ("x.1", "w1.0", "w2.0"),
        {"x": "rows", "w1": "either", "w2": "either", "w_gate": "w1"},
    )


def _forward(tensors, rest, scalars, backend):
    x = tensors[0]
    out, *pres = ffn_fwd(rows(x), *tensors[1:], *rest, *scalars, backend=backend)
    return shaped_like(out, x), *pres


def _backward(upstream, tensors, rest, outputs, scalars, need, backend):
    x, w1, b1, w2, _, w_gate, b_gate = tensors
    dout = upstream[0]
    if dout is None:
        return tuple(None if t is None else torch.zeros_like(t) for t in tensors)
    *options, keep = scalars
    pre, pre_gate = (
        (outputs[1], outputs[2] if w_gate is not None else None) if keep else (None,) * 2
    )
    dx, *grads = ffn_bwd(
        rows(x), pre, pre_gate, rows(dout), w1, b1, w2, w_gate, b_gate, *rest, *options, need,
        backend=backend,
    )  # fmt: skip
    return dx.view(x.shape) if need & 1 and x.dim() != 2 else dx, *grads


def _math(tensors, rest, scalars):
    from ..reference.ffn import ffn_math

    return ffn_math(*tensors, *rest, *scalars)


def _save(tensors, outputs):
    return tensors, (None, *outputs[1:])


_ffn = differentiable("ffn", _forward, _backward, _math, _save)


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    hidden_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
    recompute: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """dropout(dropout(act(x w1^T + b1) * (x w_gate^T + b_gate)) w2^T + b2), the feed-forward layer
    of a transformer; without w_gate the second factor is 1.

    Args:
        x: [..., K], float32, bfloat16, float16 (float64 by the reference), any strides.
        w1, w2: [F, K] and [N, F] (torch.nn.Linear's layout), any strides: weights kept transposed
            (GPT-2's Conv1D) are given as ``w1.t()``, without a copy.
        b1, b2: [F] and [N], or None.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu"; with a gate also by the name of the
            pair: "geglu", "geglu_tanh", "reglu", "swiglu".
        w_gate, b_gate: [F, K] and [F], the factor that is not activated, or None. (T5: wi_0 is w1,
            wi_1 the gate; Llama: gate_proj is w1, up_proj the gate.)
        hidden_dropout_p, dropout_p: in [0, 1), of the hidden layer and of the output; applied
            whenever above 0. Rounded to a multiple of 1/65536.
        recompute: keep only x for the backward, which then computes the hidden layer again.
        seed: the key of the dropout bits, an int or an int64 tensor of one element; None draws it
            from torch's generator.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's own products, nothing
            fused) or "reference" runs that or raises with every kernel's reason.

    Returns:
        [..., N] in x's dtype, which all tensors share. Under autocast all are cast, as by torch's
        own linear.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Sources: Hendrycks and Gimpel, arXiv 1606.08415 (gelu); Shazeer, 2002.05202 (gates).
    """
    check_backend(backend)
    check_float("x", x)
    name = _GATED.get(activation, activation) if w_gate is not None else activation
    if name is None or name not in ACTIVATIONS:
        allowed = [*list(ACTIVATIONS)[1:], *(_GATED if w_gate is not None else ())]
        more = "" if w_gate is not None or activation not in _GATED else " without w_gate"
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, allowed))}, got {activation!r}{more}"
        )
    check_dropout(hidden_dropout_p, "hidden_dropout_p")
    check_dropout(dropout_p)
    if not x.dim():
        raise ValueError("x must have at least 1 dimension, got a scalar")
    check_like(x, w1=w1, b1=b1, w2=w2, b2=b2, w_gate=w_gate, b_gate=b_gate)
    check_weight("w1", w1, ("F", x.shape[-1]))
    F = w1.shape[0]
    check_weight("w2", w2, ("N", F))
    check_shape("b1", b1, (F,))
    check_shape("b2", b2, w2.shape[:1])
    if w_gate is not None:
        check_weight("w_gate", w_gate, (F, x.shape[-1]))
    elif b_gate is not None:
        raise ValueError("b_gate must be None without w_gate, got a tensor")
    check_shape("b_gate", b_gate, (F,))
    tensors = autocast(x, w1, b1, w2, b2, w_gate, b_gate)
    check_dtypes(
        tensors[0],
        **dict(zip(("w1", "b1", "w2", "b2", "w_gate", "b_gate"), tensors[1:], strict=True)),
    )
    dropped = hidden_dropout_p or dropout_p
    return _ffn(
        tensors,
        (seed_tensor(seed, x.device) if dropped else None,),
        (
            ACTIVATIONS[name],
            float(hidden_dropout_p),
            float(dropout_p),
            not recompute and wants_gradient(tensors),
        ),
        backend,
        (1, 2),
    )[0]
