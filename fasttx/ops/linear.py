"""out = act(x W^T + bias) + residual, over the last dimension.

Shapes, below the door: x [M, K], weight [N, K], bias [N], residual and out [M, N], all of one of
float32, bfloat16, float16 and of any strides: a weight kept as [K, N] comes as its transposed view.
pre [M, N] in x's dtype is x W^T + bias, kept for the backward where `keep` (0 elements otherwise);
the activation itself reads it before it is rounded. activation: 0 none, 1 gelu (erf), 2 gelu_tanh,
3 relu, 4 silu.

    dpre = dout act'(pre)   dx = dpre W   dweight = dpre^T x   dbias = sum of dpre over the rows

need: dx 1, dweight 2, dbias 4; the residual's gradient is dout itself. The backward gets pre only
where there is an activation. dweight has weight's strides where these are dense. Sums are in
float32 (float64 for float64) in a fixed order, and rounded once.

Source of gelu: Hendrycks and Gimpel, arXiv 1606.08415.
"""

import math

import torch
from torch import Tensor

from ..autograd import differentiable
from ..op import HALF, Kernel, Needs, Op
from ._checks import check_backend, check_float, short

__all__ = ["linear", "linear_bwd", "linear_fwd"]

ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}


@Op
def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    activation: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


@Op
def linear_bwd(
    x: Tensor, weight: Tensor, pre: Tensor | None, dout: Tensor, activation: int, need: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need & 1 else 0),
        torch.empty_like(weight) if need & 2 else x.new_empty(0),
        x.new_empty(weight.shape[0] if need & 4 else 0),
    )


linear_fwd.backward = linear_bwd


INDEX = 2**31 - 256  # coordinates of copies and tiles are 32-bit


def set_kernels(op: Op, room: str, sizes: tuple[str, ...], matrices: dict[str, str]) -> None:
    """The tables of an op whose kernels are called after it in every room. sizes, matrices: what
    CUDA C++ needs, dimensions that are not empty and how operands lie. "torch" comes first where
    it was measured to be the fastest (fasttx/choice.py)."""
    triton = f"fasttx.kernels.{room}:{op.name}"
    reference = Kernel(
        "reference", f"fasttx.reference.{room}:{op.name}", Needs(dtypes=None, dtype_of="x")
    )
    unfused = Kernel(
        "torch",
        f"fasttx.reference.unfused:{op.name}",
        Needs(dtype_of="x", absent=("seed",) if "seed" in op.at else (), by_name=True),
    )
    interpreted = Needs(dtype_of="x", env=("TRITON_INTERPRET", "1"), by_name=True)
    op.kernels(
        cpu=[
            Kernel("cpu", f"native:{op.name}_cpu", Needs(dtype_of="x")),
            Kernel("triton", triton, interpreted),
            unfused,
            reference,
        ],
        cuda=[
            Kernel("triton", triton, Needs(dtype_of="x", sm=80)),
            Kernel(
                "cuda",
                f"native:{op.name}_cuda",
                Needs(
                    HALF,
                    dtype_of="x",
                    sizes={"x.0": (0, INDEX), **dict.fromkeys(sizes, (1, INDEX))},
                    matrices=matrices,
                    sm=80,
                ),
            ),
            unfused,
            reference,
        ],
    )


for _op in (linear_fwd, linear_bwd):
    set_kernels(_op, "linear", ("x.1", "weight.0"), {"x": "rows", "weight": "either"})


def rows(t: Tensor | None) -> Tensor | None:
    """[..., N] as [M, N]."""
    return t if t is None or t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def shaped_like(out: Tensor, x: Tensor) -> Tensor:
    """[M, N] as [..., N]. No view to autograd, which forbids changing one in place where a Function
    made it; torch's own linear allows it."""
    return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])


def _forward(tensors, rest, scalars, backend):
    x, weight, bias, residual = tensors
    out, pre = linear_fwd(rows(x), weight, bias, rows(residual), *scalars, backend=backend)
    return shaped_like(out, x), pre


def _backward(upstream, tensors, rest, outputs, scalars, need, backend):
    x, weight, _, residual = tensors
    dout = upstream[0]
    if dout is None:
        return tuple(None if t is None else torch.zeros_like(t) for t in tensors)
    dx = dweight = dbias = None
    if need & 7:
        activation = scalars[0]
        pre = outputs[1] if activation else None
        dx, dweight, dbias = linear_bwd(
            rows(x), weight, pre, rows(dout), activation, need & 7, backend=backend
        )
        if need & 1 and x.dim() != 2:
            dx = dx.view(x.shape)
    return dx, dweight, dbias, dout


def _math(tensors, rest, scalars):
    from ..reference.linear import linear_math

    return linear_math(*tensors, *scalars)


def _save(tensors, outputs):
    return tensors, (None, outputs[1])


_linear = differentiable("linear", _forward, _backward, _math, _save)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(x weight^T + bias) + residual, as torch.nn.functional.linear, with what follows it fused.

    Args:
        x: [..., K], float32, bfloat16, float16 (float64 by the reference), any strides.
        weight: [N, K], any strides: weights kept as [K, N] (GPT-2's Conv1D) are given as
            ``weight.t()``, without a copy.
        bias: [N] or None.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu".
        residual: [..., N] or None, added after the activation.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's own products, nothing
            fused) or "reference" runs that or raises with every kernel's reason.

    Returns:
        [..., N] in x's dtype, which all tensors share. Under autocast x, weight and bias are cast,
        as by torch's own linear; a residual that is wider then is added as torch adds it.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Source of gelu: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    check_backend(backend)
    check_float("x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be None, {', '.join(map(repr, list(ACTIVATIONS)[1:]))}, "
            f"got {activation!r}"
        )
    if not x.dim():
        raise ValueError("x must have at least 1 dimension, got a scalar")
    check_like(x, weight=weight, bias=bias, residual=residual)
    check_weight("weight", weight, ("N", x.shape[-1]))
    N = weight.shape[0]
    check_shape("bias", bias, (N,))
    check_shape("residual", residual, (*x.shape[:-1], N))
    x, weight, bias, added = autocast(x, weight, bias, residual)
    check_dtypes(x, weight=weight, bias=bias)
    outside = None
    if residual is not None:
        if torch.is_autocast_enabled(x.device.type):
            if residual.dtype is x.dtype:
                added = residual
            else:
                added, outside = None, residual
        else:
            check_dtypes(x, residual=residual)
    tensors = (x, weight, bias, added)
    code = ACTIVATIONS[activation]
    keep = bool(code) and wants_gradient(tensors)
    out = _linear(tensors, (), (code, keep), backend, (1,))[0]
    return out if outside is None else out + outside


def wants_gradient(tensors: tuple) -> bool:
    """Whether a backward may follow."""
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype, where it is on; float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t if t is None or t.dtype in (dtype, torch.float64) else t.to(dtype) for t in tensors
    )


def check_like(x: Tensor, **tensors) -> None:
    """Tensors or None, of a floating dtype, on x's device."""
    for name, t in tensors.items():
        if t is None:
            continue
        check_float(name, t)
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")


def check_dtypes(x: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.dtype is not x.dtype:
            raise TypeError(f"{name} must have x's dtype {short(x.dtype)}, got {short(t.dtype)}")


def check_shape(name: str, t: Tensor | None, shape: tuple) -> None:
    if t is not None and t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def check_weight(name: str, t: Tensor | None, shape: tuple) -> None:
    """t is a matrix; an entry of shape that is a letter stands for any size."""
    if t is None:
        raise TypeError(f"{name} must be a tensor, got NoneType")
    fits = t.dim() == 2 and all(
        isinstance(n, str) or n == m for n, m in zip(shape, t.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {tuple(t.shape)}")
