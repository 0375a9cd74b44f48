"""loss = -sum_c q_c log softmax(logits)_c + z_loss lse^2, with labels q smoothed and weighted.

Shapes: V classes, M = B S rows. Below the door logits [B,S,V] (any strides), target [M] int64,
weight [V] float32 or None, both contiguous; reduction 0 none, 1 mean, 2 sum. With e =
label_smoothing, t the target and w the class weights (1 where None), a row's terms are

    ce = (1 - e) w_t (lse - x_t) + e / V sum_c w_c (lse - x_c),    z = z_loss lse^2

and mean is sum(ce) / sum(w_t) + sum(z) / count over the rows not ignored. loss: [M] for none, else
a scalar. Residuals: peak [M], a value near the row's maximum, and log_sum [M] with lse = peak +
log_sum (apart, exp(x - peak - log_sum) stays exact for large logits); norm [2], what ce and z were
multiplied by. Statistics, loss and dloss are float32, for float64 logits float64. A target out of
range gives NaN and no access out of bounds. Any backend's backward follows any backend's forward.
"""

import functools
import os

import torch
from torch import Tensor

from ..autograd import Direct, differentiable
from ..op import HALF, Kernel, Needs, Op
from ._checks import check_backend, check_float, extremes, has_values, number, short

__all__ = [
    "cross_entropy",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "cross_entropy_inplace",
    "cross_entropy_rescale",
]
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@Op
def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, reduction: int, label_smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, dtype = target.shape, _statistics(logits)
    return (
        logits.new_empty(() if reduction else rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty((2,), dtype=dtype),
    )


@Op
def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
    peak: Tensor, log_sum: Tensor, norm: Tensor,
    ignore_index: int, reduction: int, label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


@functools.partial(Op, mutates=("logits",))
def cross_entropy_inplace(
    logits: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, reduction: int, label_smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, factor): factor * dloss times what is left in logits is their gradient.

    factor is 1, but for the mean of float16 logits, which have no room for gradients divided by the
    number of rows.
    """
    dtype = _statistics(logits)
    loss = logits.new_empty(() if reduction else target.shape, dtype=dtype)
    return loss, logits.new_empty((), dtype=dtype)


@functools.partial(Op, mutates=("grad",))
def cross_entropy_rescale(
    grad: Tensor, dloss: Tensor, factor: Tensor, target: Tensor, ignore_index: int
) -> None:
    """grad [B,S,V] *= factor * dloss (a scalar or [M]) but in ignored rows, which hold 0."""


def _statistics(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


cross_entropy_fwd.backward = cross_entropy_bwd
for _op in (cross_entropy_fwd, cross_entropy_bwd, cross_entropy_inplace, cross_entropy_rescale):
    _of = "grad" if _op is cross_entropy_rescale else "logits"
    _triton = f"fasttx.kernels.cross_entropy:{_op.name}"
    _reference = Kernel(
        "reference", f"fasttx.reference.cross_entropy:{_op.name}", Needs(dtypes=None)
    )
    # PyTorch has nothing that leaves the gradient in the logits' memory.
    _unfused = []
    if "z_loss" in _op.at and not _op.mutates:
        _needs = Needs(dtype_of=_of, absent=("z_loss",), by_name=True)
        _unfused = [Kernel("torch", f"fasttx.reference.unfused:{_op.name}", _needs)]
    _op.kernels(
        cpu=[
            Kernel("cpu", f"native:{_op.name}_cpu", Needs(dtype_of=_of)),
            Kernel(
                "triton",
                _triton,
                Needs(dtype_of=_of, env=("TRITON_INTERPRET", "1"), by_name=True),
            ),
            *_unfused,
            _reference,
        ],
        cuda=[
            Kernel("triton", _triton, Needs(dtype_of=_of, sm=80)),
            Kernel("cuda", f"native:{_op.name}_cuda", Needs(HALF, _of, sm=80)),
            *_unfused,
            _reference,
        ],
    )


def _forward(tensors, rest, scalars, backend):
    return cross_entropy_fwd(*tensors, *rest, *scalars, backend=backend)


def _backward(upstream, tensors, rest, outputs, scalars, need, backend):
    dloss, residuals = upstream[0], outputs[1:]
    if dloss is None:
        dloss = residuals[0].new_zeros(() if scalars[1] else rest[0].shape)
    arguments = (dloss, *tensors, *rest, *residuals, *scalars)
    return (cross_entropy_bwd(*arguments, backend=backend),)


def _math(tensors, rest, scalars):
    from ..reference.cross_entropy import cross_entropy_math

    return cross_entropy_math(*tensors, *rest, *scalars)


def _save(tensors, outputs):
    return tensors, (None, *outputs[1:])


_direct = Direct(cross_entropy_fwd, "u0 t0 r0 r1 o1 o2 o3 s0 s1 s2 s3")
_cross_entropy = differentiable("cross_entropy", _forward, _backward, _math, _save, _direct)


class _InPlace(torch.autograd.Function):
    """The gradient is in the logits' memory when the forward returns; the backward hands it out."""

    @staticmethod
    def forward(ctx, logits, target, weight, scalars, backend):
        loss, factor = cross_entropy_inplace(logits, target, weight, *scalars, backend=backend)
        torch.autograd.graph.increment_version(logits)
        ctx.grad, ctx.backend, ctx.ignore_index = logits.detach(), backend, scalars[0]
        ctx.version = ctx.grad._version
        ctx.save_for_backward(target, factor)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fasttx.cross_entropy: inplace_grad=True has no second derivative (create_graph)"
            )
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError(
                "fasttx.cross_entropy: a second backward, but inplace_grad=True wrote the gradient "
                "into the logits and the first backward handed it out"
            )
        if grad._version != ctx.version:
            raise RuntimeError(
                "fasttx.cross_entropy: inplace_grad=True wrote the gradient into the logits, and "
                "they were changed before the backward"
            )
        target, factor = ctx.saved_tensors
        cross_entropy_rescale(grad, dloss, factor, target, ctx.ignore_index, backend=ctx.backend)
        torch.autograd.graph.increment_version(grad)
        return grad, None, None, None, None


def check_losses(reduction, ignore_index, label_smoothing, z_loss) -> tuple:
    """The inner op's scalars from the door's options."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        raise number("label_smoothing", label_smoothing, "in [0, 1]")
    if not isinstance(z_loss, (int, float)) or not 0.0 <= z_loss < float("inf"):
        raise number("z_loss", z_loss, "finite and at least 0")
    return ignore_index, REDUCTIONS[reduction], float(label_smoothing), float(z_loss)


def check_target(target, shape: torch.Size, device: torch.device, V: int, ignore_index: int):
    """target as contiguous int64 [M]; on the CPU its values are checked too."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype is torch.bool:
        raise TypeError(f"target must hold class indices (integers), got {short(target.dtype)}")
    if target.shape != shape:
        raise ValueError(
            f"target must have the shape {tuple(shape)} of the rows (the class dimension is the "
            f"last), got {tuple(target.shape)}"
        )
    if target.device != device:
        raise ValueError(f"target must be on the logits' device {device}, got {target.device}")
    target = target.reshape(-1).long().contiguous()
    if has_values(target) or (target.is_cuda and os.environ.get("FASTTX_CHECK", "0") == "1"):
        _check_range(target, V, ignore_index)
    return target


def _check_range(target: Tensor, V: int, ignore_index: int) -> None:
    if not target.numel():
        return
    low, high = extremes(target)
    if low >= 0 and high < V:
        return
    bad = ((target < 0) | (target >= V)) & (target != ignore_index)
    if bad.any():
        raise ValueError(
            f"target must be in [0, {V}) (V={V} classes) or ignore_index={ignore_index}, got "
            f"{int(target[bad][0])}"
        )


def check_weight(weight, V: int, device: torch.device, name: str = "weight") -> Tensor | None:
    """Class weights as contiguous float32 [V] (float64 stays)."""
    if weight is None:
        return None
    check_float(name, weight)
    if weight.shape != (V,):
        raise ValueError(f"{name} must have shape ({V},), one a class, got {tuple(weight.shape)}")
    if weight.device != device:
        raise ValueError(f"{name} must be on the logits' device {device}, got {weight.device}")
    if weight.requires_grad:
        raise ValueError(f"{name} must not require grad: class weights get no gradient, detach it")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype).contiguous()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Cross-entropy of integer targets, a superset of torch.nn.functional.cross_entropy.

    ce = (1 - label_smoothing) weight[t] (lse - x_t)
       + label_smoothing / V  sum_c weight[c] (lse - x_c),     lse = log sum_c exp(x_c)

    **The classes are the last dimension**, whatever the number of dimensions: logits [..., V] with
    target [...]. In PyTorch they are dimension 1; the two agree for [M, V] and [V], and
    ``F.cross_entropy(x, t)`` with x [N, V, d] is ``cross_entropy(x.movedim(1, -1), t)``.

    Args:
        logits: [..., V], V >= 1, float32, bfloat16, float16 (float64 by the reference). Any
            strides.
        target: [...] integers in [0, V), or ignore_index: such a row adds nothing to the loss, is
            not read and has gradient 0. (Class probabilities are not supported.)
        weight: [V] floating class weights; they get no gradient.
        ignore_index: any int.
        reduction: "mean" divides by the sum of weight[target] over the rows not ignored (nan if
            there are none), "sum", or "none".
        label_smoothing: in [0, 1].
        z_loss: adds z_loss * lse^2 of every row not ignored (not weighted; "mean" divides it by the
            number of rows).
        inplace_grad: where logits require grad, the forward leaves their gradient in their memory,
            so that no second tensor of their size exists. Their values are lost, their version
            counter rises, a second backward raises, and so does a double backward. Under
            torch.compile and torch.func, and by "torch", the ordinary way is taken.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's own log_softmax and
            nll_loss, without z_loss) or "reference" runs that or raises with every kernel's reason.

    Returns:
        float32 (float64 for float64): a scalar, or target's shape for "none".

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs. On
            a GPU values of target are not read: a target out of range makes the loss and its row's
            gradient NaN (FASTTX_CHECK=1 checks them, with a sync).
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Sources: Milakov and Gimelshein, arXiv 1805.02867 (the online sum); Szegedy et al., 1512.00567
    (label smoothing); Chowdhery et al., 2204.02311 (z-loss).
    """
    check_backend(backend)
    check_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got shape {tuple(logits.shape)}")
    shape, V, device = logits.shape[:-1], logits.shape[-1], logits.device
    scalars = check_losses(reduction, ignore_index, label_smoothing, z_loss)
    rows = check_target(target, shape, device, V, ignore_index)
    weight = check_weight(weight, V, device)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    inplace_grad = inplace_grad and logits.requires_grad and torch.is_grad_enabled()
    if inplace_grad and not traced and backend != "torch":
        loss = _InPlace.apply(_writable(logits), rows, weight, scalars, backend)
    else:
        loss = _cross_entropy((_rows(logits),), (rows, weight), scalars, backend, (1, 2, 3))[0]
    return loss if scalars[1] else loss.reshape(shape)


def _rows(logits: Tensor) -> Tensor:
    """logits as [B,S,V]: any strides of up to three dimensions are kept."""
    if logits.dim() == 3:
        return logits
    if logits.dim() < 3:
        return logits.reshape((1,) * (3 - logits.dim()) + logits.shape)
    return logits.flatten(0, -3)


def _writable(logits: Tensor) -> Tensor:
    try:
        rows = logits.view(-1, *logits.shape[-2:]) if logits.dim() > 3 else _rows(logits)
    except RuntimeError:
        rows = None
    if rows is None or torch._debug_has_internal_overlap(rows) == 1:
        raise ValueError(
            "inplace_grad needs logits with memory of their own for every element, got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )
    return rows
