"""cross_entropy(x weight^T + bias, target), whose logits never exist whole.

Shapes: x [M,K], weight [V,K], bias [V] or None, of one dtype; target [M] int64, class_weight [V]
float32 or None; scalars as in fasttx/ops/cross_entropy.py. Rows to be ignored are taken out first
and cost nothing. need: dx 1, dweight 2, dbias 4. The forward op gives the loss and, for mean and
sum, the gradients asked for, at an upstream gradient of `headroom(x, reduction)`; the backward op
computes them from scratch for any upstream gradient (a scalar, or [M] for none). Products are
torch's, `_linear_cross_entropy.py` walks over them, `linear_cross_entropy_slope` turns a block of
logits into its gradient: rise * exp(logit - peak - log_sum) - fall * class_weight, less hit at the
target, with scales [3, R] = rise, fall, hit and `first` the class of the first column.
"""

import functools

import torch
from torch import Tensor

from ..autograd import differentiable
from ..op import Kernel, Needs, Op
from ..reference.linear_cross_entropy import headroom, linear_cross_entropy_math
from ._checks import check_backend, check_float, short
from .cross_entropy import check_losses, check_target, check_weight, cross_entropy

__all__ = [
    "linear_cross_entropy",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_cross_entropy_slope",
]
BACKENDS = ("cpu", "triton", "reference", "torch")


@Op
def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    ignore_index: int, reduction: int, label_smoothing: float, z_loss: float, need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    loss = x.new_empty(() if reduction else target.shape, dtype=dtype)
    return loss, *_gradients(x, weight, bias, need)


@Op
def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    ignore_index: int, reduction: int, label_smoothing: float, z_loss: float, need: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(x, weight, bias, need)


@functools.partial(Op, mutates=("logits",))
def linear_cross_entropy_slope(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, peak: Tensor, log_sum: Tensor,
    scales: Tensor, first: int,
) -> None:  # fmt: skip
    """logits [R,C] become their gradient."""


def _gradients(x, weight, bias, need) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        x.new_empty(0) if t is None or not need >> bit & 1 else t.new_empty(t.shape)
        for bit, t in enumerate((x, weight, bias))
    )


linear_cross_entropy_fwd.backward = linear_cross_entropy_bwd
for _op in (linear_cross_entropy_fwd, linear_cross_entropy_bwd):
    _walk = f"fasttx.ops._linear_cross_entropy:{_op.name.rpartition('_')[2]}"
    _reference = Kernel(
        "reference", f"fasttx.reference.linear_cross_entropy:{_op.name}", Needs(dtypes=None)
    )
    _unfused = Kernel(
        "torch",
        f"fasttx.reference.unfused:{_op.name}",
        Needs(dtype_of="x", absent=("z_loss",), by_name=True),
    )
    _op.kernels(
        cpu=[
            Kernel("cpu", f"{_walk}_cpu", Needs(dtype_of="x")),
            Kernel(
                "triton",
                f"{_walk}_triton",
                Needs(dtype_of="x", env=("TRITON_INTERPRET", "1"), by_name=True),
            ),
            _unfused,
            _reference,
        ],
        cuda=[
            Kernel("triton", f"{_walk}_triton", Needs(dtype_of="x", sm=80)),
            _unfused,
            _reference,
        ],
    )
_slope = "linear_cross_entropy_slope"
_on_cpu = Needs(dtype_of="logits", env=("TRITON_INTERPRET", "1"), by_name=True)
_triton = f"fasttx.kernels.linear_cross_entropy:{_slope}"
linear_cross_entropy_slope.kernels(
    cpu=[
        Kernel("cpu", f"native:{_slope}_cpu", Needs(dtype_of="logits")),
        Kernel("triton", _triton, _on_cpu),
    ],
    cuda=[Kernel("triton", _triton, Needs(dtype_of="logits", sm=80))],
)


def _forward(tensors, rest, scalars, backend):
    return linear_cross_entropy_fwd(*tensors, *rest, *scalars, 0, backend=backend)[:1]


def _backward(upstream, tensors, rest, outputs, scalars, need, backend):
    dloss = upstream[0]
    if dloss is None:
        dloss = tensors[0].new_zeros(() if scalars[1] else rest[0].shape)
    return linear_cross_entropy_bwd(dloss, *tensors, *rest, *scalars, need, backend=backend)


def _math(tensors, rest, scalars):
    return (linear_cross_entropy_math(*tensors, *rest, *scalars),)


def _save(tensors, outputs):
    return tensors, (None,)


_recomputed = differentiable("linear_cross_entropy", _forward, _backward, _math, _save)


class _WithGradients(torch.autograd.Function):
    """The forward computes the gradients; the first backward scales them and hands them out."""

    @staticmethod
    def forward(ctx, rest, scalars, backend, *tensors):
        need = sum(1 << i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed)
        arguments = (*tensors, *rest, *scalars)
        loss, *ctx.gradients = linear_cross_entropy_fwd(*arguments, need, backend=backend)
        ctx.save_for_backward(*tensors, *rest)
        ctx.scalars, ctx.need, ctx.backend = scalars, need, backend
        return loss

    @staticmethod
    def backward(ctx, dloss):
        tensors, rest = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(dloss, tensors, rest, ctx.scalars, ctx.need)
        elif ctx.gradients is None:
            arguments = (*tensors, *rest, *ctx.scalars, ctx.need)
            grads = linear_cross_entropy_bwd(dloss, *arguments, backend=ctx.backend)
        else:
            grads, ctx.gradients = ctx.gradients, None
            factor = dloss / headroom(tensors[0], ctx.scalars[1])
            if factor.is_cuda or factor != 1:
                for g in grads:
                    g.mul_(factor)
        return None, None, None, *(g if ctx.need >> i & 1 else None for i, g in enumerate(grads))


def _differentiable_gradients(dloss, tensors, rest, scalars, need) -> list:
    """By the formula in plain PyTorch, so that they have gradients themselves."""
    wanted = [t for i, t in enumerate(tensors) if need >> i & 1]
    found = iter(torch.autograd.grad(_math(tensors, rest, scalars)[0], wanted, dloss,
                                     create_graph=True))  # fmt: skip
    return [next(found) if need >> i & 1 else None for i in range(3)]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_logits: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""fasttx.cross_entropy(linear(x, weight, bias), target) without the logits [..., V].

    Rows are taken in chunks through torch's matrix product and the cross-entropy kernels; memory
    beyond the inputs and the gradients is at most an eighth of the float32 logits (or 8 MiB).
    Rows whose target is ignore_index are left out before anything is multiplied.

    Args:
        x: [..., K], weight: [V, K] (nn.Linear's layout), bias: [V] or None, of one dtype: float32,
            bfloat16, float16 (float64 by the reference). Under autocast they are cast, as by
            linear.
        target: [...] integers in [0, V) or ignore_index.
        class_weight: [V], what cross_entropy calls weight.
        ignore_index, reduction, label_smoothing, z_loss: as in cross_entropy.
        return_logits: also return the logits [..., V]; then they do exist, and this is linear
            followed by cross_entropy.
        backend: None chooses; "cpu", "triton", "torch" (PyTorch's own operations on whole logits,
            without z_loss) or "reference" runs that or raises with every kernel's reason.

    For "mean" and "sum" the gradients are computed in the forward and scaled by the upstream
    gradient; for "none", for a second backward and under torch.compile the backward computes them.
    Products accumulate in float32 and a gradient is rounded once: 16-bit weight gradients of more
    than one chunk are computed by slices of classes, at the price of a fourth product.

    Returns:
        float32 loss (float64 for float64): a scalar, or target's shape for "none"; with
        return_logits (loss, logits).

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Sources: Wijmans et al., arXiv 2411.09009; Hsu et al., 2410.10989 (chunks of rows).
    """
    check_backend(backend, BACKENDS)
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None or name != "bias":
            check_float(name, t)
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (t if t is None or t.dtype is torch.float64 else t.to(kind)
                           for t in (x, weight, bias))  # fmt: skip
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "x must be [..., K] and weight [V, K] with V >= 1, got shapes "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    V, K = weight.shape
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must have shape ({V},), got {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype is not x.dtype:
            raise TypeError(f"{name} must have x's dtype {short(x.dtype)}, got {short(t.dtype)}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    scalars = check_losses(reduction, ignore_index, label_smoothing, z_loss)
    rows = check_target(target, x.shape[:-1], x.device, V, ignore_index)
    class_weight = check_weight(class_weight, V, x.device, "class_weight")
    if return_logits:
        logits = torch.nn.functional.linear(x, weight, bias)
        loss = cross_entropy(
            logits, target, weight=class_weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, backend=backend,
        )  # fmt: skip
        return loss, logits
    tensors = (x.reshape(-1, K), weight, bias)
    recompute = (
        scalars[1] == 0
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not torch.is_grad_enabled()
        or not any(t is not None and t.requires_grad for t in tensors)
    )
    if recompute:
        (loss,) = _recomputed(tensors, (rows, class_weight), scalars, backend)
    else:
        loss = _WithGradients.apply((rows, class_weight), scalars, backend, *tensors)
    return loss if scalars[1] else loss.reshape(target.shape)
