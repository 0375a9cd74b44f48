"""out = norm(z), z = residual + dropout(x + x_bias), over the last dimension.

LayerNorm: norm(z) = (z - mean) * rstd * weight + bias, mean = sum(z) / N, rstd = 1 / sqrt(sum((z -
mean)^2) / N + eps). RMSNorm: norm(z) = z * rstd * weight + bias, rstd = 1 / sqrt(sum(z^2) / N +
eps).

Shapes, below the door: x and residual [..., N], of 1 to 4 dimensions and any strides, each in
float32, bfloat16 or float16; weight, bias, x_bias [N]. total is z in the dtype to which x and
residual promote (0 elements unless prenorm); out has that dtype too, or float32 where `wide`; both
are contiguous. stats float32 [2, M] holds mean and rstd of the M rows, [1, M] rstd alone for rms.
Dropout decides by (flattened row, column): seed int64 [1] is its key (fasttx/reference/philox.py).
need: dx 1, dresidual 2, dweight 4, dbias 8, dx_bias 16; parameter gradients are summed in float32
in a fixed order and rounded once. The backward computes z again: residuals are the inputs and
stats, so any backend's backward follows any backend's forward.

Sources: Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467.
"""

import math

import torch
from torch import Tensor

from ..autograd import Direct, differentiable
from ..op import HALF, Kernel, Needs, Op
from ._checks import (
    FLOATS,
    KINDRED,
    check_backend,
    check_dropout,
    check_float,
    number,
    seed_tensor,
    short,
)

__all__ = ["add_norm", "add_norm_bwd", "add_norm_fwd", "layer_norm", "rms_norm"]

_KINDS = {"layer": False, "rms": True}


@Op
def add_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    x_bias: Tensor | None, seed: Tensor | None,
    eps: float, dropout_p: float, rms: bool, prenorm: bool, wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    statistics = torch.float64 if dtype is torch.float64 else torch.float32
    like = {"memory_format": torch.contiguous_format}
    return (
        torch.empty_like(x, dtype=torch.float32 if wide else dtype, **like),
        torch.empty_like(x, dtype=dtype, **like) if prenorm else x.new_empty(0, dtype=dtype),
        x.new_empty((1 if rms else 2, math.prod(x.shape[:-1])), dtype=statistics),
    )


@Op
def add_norm_bwd(
    x: Tensor, stats: Tensor, dout: Tensor | None, dtotal: Tensor | None,
    residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    x_bias: Tensor | None, seed: Tensor | None,
    dropout_p: float, rms: bool, need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if t is not None and need >> bit & 1
        else x.new_empty(0)
        for bit, t in enumerate((x, residual, weight, bias, x_bias))
    )


add_norm_fwd.backward = add_norm_bwd
for _op in (add_norm_fwd, add_norm_bwd):
    _triton = f"fasttx.kernels.add_norm:{_op.name}"
    _reference = Kernel(
        "reference", f"fasttx.reference.add_norm:{_op.name}", Needs(dtypes=None, dtype_of="x")
    )
    _op.kernels(
        cpu=[
            Kernel("cpu", f"native:{_op.name}_cpu", Needs(dtype_of="x")),
            Kernel(
                "triton",
                _triton,
                Needs(dtype_of="x", env=("TRITON_INTERPRET", "1"), by_name=True),
            ),
            Kernel(
                "torch",
                f"fasttx.reference.torch_own:{_op.name}",
                Needs(dtype_of="x", absent=("seed",), by_name=True),
            ),
            _reference,
        ],
        cuda=[
            Kernel("triton", _triton, Needs(dtype_of="x", sm=80)),
            Kernel("cuda", f"native:{_op.name}_cuda", Needs(HALF, dtype_of="x", sm=80)),
            _reference,
        ],
    )


def _forward(tensors, rest, scalars, backend):
    return add_norm_fwd(*tensors, *rest, *scalars, backend=backend)


def _backward(upstream, tensors, rest, outputs, scalars, need, backend):
    x, residual, *_ = tensors
    dropout_p, rms = scalars[1:3]
    # Without dropout dx is dresidual: one tensor serves both.
    shared = need & 3 == 3 and not dropout_p and residual.dtype is x.dtype
    grads = add_norm_bwd(
        x, outputs[2], *upstream[:2], *tensors[1:], *rest, dropout_p, rms,
        need & ~2 if shared else need, backend=backend,
    )  # fmt: skip
    return (grads[0], grads[0], *grads[2:]) if shared else grads


def _math(tensors, rest, scalars):
    from ..reference.add_norm import add_norm_math

    return add_norm_math(*tensors, *rest, *scalars)


def _save(tensors, outputs):
    return tensors, (None, None, outputs[2])


_direct = Direct(add_norm_fwd, "t0 o2 u0 u1 t1 t2 t3 t4 r0 s1 s2 n")
_add_norm = differentiable("add_norm", _forward, _backward, _math, _save, _direct)


def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    *,
    weight: Tensor | None,
    bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    kind: str = "layer",
    prenorm: bool = False,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(residual + dropout(x + x_bias)) over the last dimension, in one pass over memory.

    Args:
        x: [..., N], float32, bfloat16, float16 (float64 by the reference), any strides.
        residual: x's shape, or None; its dtype may differ.
        weight, bias: [N], the scale and shift after the norm, or None; any floating dtype.
        x_bias: [N], added to x before the dropout, or None.
        dropout_p: in [0, 1); applied whenever above 0. Rounded to a multiple of 1/65536.
        eps: finite, at least 0, added to the variance (the mean square for "rms").
        kind: "layer" (LayerNorm) or "rms" (RMSNorm).
        prenorm: also return the sum that is normalized.
        seed: the key of the dropout bits, an int or an int64 tensor of one element; None draws it
            from torch's generator.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's own kernels on the CPU,
            without dropout) or "reference" runs that or raises with every kernel's reason.

    Returns:
        out [..., N], or (out, sum). Both have the dtype to which x and residual promote, whatever
        the parameters' dtype; under CUDA's autocast out is float32, as torch's layer_norm. The
        statistics are those of the sum before it is rounded.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Sources: Ba et al., arXiv 1607.06450 (LayerNorm); Zhang and Sennrich, 1910.07467 (RMSNorm).
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be 'layer' or 'rms', got {kind!r}")
    check_dropout(dropout_p)
    return _norm(
        x,
        residual,
        weight,
        bias,
        x_bias,
        dropout_p,
        eps,
        _KINDS[kind],
        bool(prenorm),
        seed,
        backend,
    )


def layer_norm(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension: add_norm without
    its additions, with the same arguments, dtypes and errors. Source: Ba et al., arXiv
    1607.06450."""
    return _norm(x, None, weight, bias, None, 0.0, eps, False, False, None, backend)


def rms_norm(
    x: Tensor, *, weight: Tensor | None = None, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: add_norm(kind="rms") without its
    additions, with the same arguments, dtypes and errors. Source: Zhang and Sennrich, arXiv
    1910.07467."""
    return _norm(x, None, weight, None, None, 0.0, eps, True, False, None, backend)


def _norm(x, residual, weight, bias, x_bias, dropout_p, eps, rms, prenorm, seed, backend):
    if backend is not None:
        check_backend(backend)
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise number("eps", eps, "a finite number of at least 0")
    tensors = (x, residual, weight, bias, x_bias)
    wide = flat = False
    if not _direct.alike(tensors, (0, 0, 1, 1, 1)):
        _check(*tensors)
        flat = x.dim() > 4
        if flat:
            rows = (None if t is None else t.flatten(0, -2) for t in tensors[:2])
            tensors = (*rows, *tensors[2:])
        cast = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
        wide = cast and x.dtype is not torch.float64
    outputs = _add_norm(
        tensors,
        (seed_tensor(seed, x.device) if dropout_p else None,),
        (float(eps), float(dropout_p), rms, prenorm, wide),
        backend,
        (2,) if prenorm else (1, 2),
    )
    if flat:
        outputs = tuple(t.reshape(x.shape) for t in outputs[: 1 + prenorm])
    return (outputs[0], outputs[1]) if prenorm else outputs[0]


def _check(x, residual, weight, bias, x_bias) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        check_float("x", x)
    shape, device, dtypes = x.shape, x.device, KINDRED[x.dtype]
    if not shape:
        raise ValueError("x must have at least 1 dimension, got a scalar")
    if residual is not None and not (
        isinstance(residual, Tensor)
        and residual.dtype in dtypes
        and residual.shape == shape
        and residual.device == device
    ):
        _refuse("residual", residual, shape, x)
    vector = shape[-1:]
    for name, t in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if t is not None and not (
            isinstance(t, Tensor) and t.dtype in dtypes and t.shape == vector and t.device == device
        ):
            _refuse(name, t, vector, x)


def _refuse(name: str, t, shape: tuple, x: Tensor) -> None:
    check_float(name, t)
    if t.shape != shape:
        what = f"x's shape {tuple(shape)}" if name == "residual" else f"shape {tuple(shape)}"
        raise ValueError(f"{name} must have {what}, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    raise TypeError(
        f"{name} must be float64 exactly where x is, got {short(t.dtype)} beside {short(x.dtype)}"
    )
