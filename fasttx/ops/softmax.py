"""softmax(scale * x + mask) and its logarithm along one dimension.

Shapes, below the door: x [..., S, T], of 1 to 4 dimensions, the softmax along the last, any
strides; mask bool (True visible) or additive (exactly -inf hidden), of as many dimensions, each x's
or 1. causal hides columns j > i + off of row i, off = T - S where lower_right, else 0. out has x's
dtype, or float32 where `wide`, and x's order in memory. log: the logarithm, -inf where hidden. A
row with nothing visible gives 0 (-inf), gradients 0. The backward reads out alone: y = 0 (-inf)
takes part in nothing, so any backend's backward follows any backend's forward. need: dx 1, dmask 2;
dmask has mask's shape and dtype, summed in float32 in a fixed order and rounded once.
"""

import math

import torch
from torch import Tensor

from ..autograd import Direct, differentiable
from ..op import HALF, Kernel, Needs, Op
from ._checks import FLOATS, check_backend, check_float, number, short

__all__ = ["log_softmax", "softmax", "softmax_bwd", "softmax_fwd", "softmax_out"]

_ALIGNMENTS = {False: (False, False), True: (True, False), "upper_left": (True, False),
               "lower_right": (True, True)}  # fmt: skip


@Op
def softmax_fwd(
    x: Tensor, mask: Tensor | None,
    scale: float, causal: bool, lower_right: bool, log: bool, wide: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, dtype=torch.float32 if wide else x.dtype)


@Op
def softmax_bwd(
    dout: Tensor, out: Tensor, x: Tensor, mask: Tensor | None,
    scale: float, causal: bool, lower_right: bool, log: bool, need: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dmask = mask.new_empty(mask.shape) if mask is not None and need & 2 else x.new_empty(0)
    return torch.empty_like(x) if need & 1 else x.new_empty(0), dmask


def _softmax_out(
    out: Tensor, x: Tensor, mask: Tensor | None,
    scale: float, causal: bool, lower_right: bool, log: bool, wide: bool,
) -> None:  # fmt: skip
    """softmax_fwd into memory that is there."""


_softmax_out.__name__ = "softmax_out"
softmax_out = Op(_softmax_out, mutates=("out",))
softmax_fwd.backward = softmax_bwd
for _op in (softmax_fwd, softmax_bwd, softmax_out):
    _name = "softmax_bwd" if _op is softmax_bwd else "softmax_fwd"
    _triton, _torch = f"fasttx.kernels.softmax:{_name}", "fasttx.reference.torch_own"
    _reference = Kernel(
        "reference", f"fasttx.reference.softmax:{_name}", Needs(dtypes=None, dtype_of="x")
    )
    _own_absent = ("mask", "causal") if _op is softmax_bwd else ("mask", "causal", "wide")
    _own = Needs(dtype_of="x", absent=_own_absent, by_name=True)
    _op.kernels(
        cpu=[
            Kernel("cpu", f"native:{_name}_cpu", Needs(dtype_of="x")),
            Kernel(
                "triton",
                _triton,
                Needs(dtype_of="x", env=("TRITON_INTERPRET", "1"), by_name=True),
            ),
            Kernel("torch", f"{_torch}:{_name}", _own),
            _reference,
        ],
        cuda=[
            Kernel("triton", _triton, Needs(dtype_of="x", sm=80)),
            Kernel("cuda", f"native:{_name}_cuda", Needs(HALF, dtype_of="x", sm=80)),
            _reference,
        ],
    )


def _forward(tensors, rest, scalars, backend):
    return (softmax_fwd(*tensors, *scalars, backend=backend),)


def _backward(upstream, tensors, rest, outputs, scalars, need, backend):
    (dout,), (out,) = upstream, outputs
    dout = torch.zeros_like(out) if dout is None else dout
    return softmax_bwd(dout, out, *tensors, *scalars[:4], need, backend=backend)


def _math(tensors, rest, scalars):
    from ..reference.softmax import softmax_math

    return (softmax_math(*tensors, *scalars),)


_direct = Direct(softmax_fwd, "u0 o0 t0 t1 s0 s1 s2 s3 n")
_softmax = differentiable("softmax", _forward, _backward, _math, direct=_direct)


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool | str = False,
    dim: int = -1,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * x + mask) along a dimension, in one pass over memory.

    Args:
        x: any shape of at least 1 dimension, float32, bfloat16, float16 (float64 by the reference),
            any strides; no dimension is copied to be the last.
        scale: finite.
        mask: bool (True: visible) or floating (added; exactly -inf hides, any finite value is only
            a number), of any shape that broadcasts to x's; float64 only beside float64. It is read
            through its strides, never expanded; its gradient has its shape.
        is_causal: False; True or "upper_left": column j <= row i; "lower_right": j <= i + T - S.
            Columns T lie along dim, rows S along the last other dimension.
        dim: the dimension that sums to 1.
        out: memory for the result, of its shape and dtype, or None. x itself may be; gradients are
            not taken then.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's own kernel, where there
            is no mask) or "reference" runs that or raises with every kernel's reason.

    Returns:
        x's shape and dtype, and x's order in memory where that is dense; float32 under CUDA's
        autocast, as torch's. What is hidden is 0, and so is a row with nothing visible, where
        torch gives NaN; a logit of -inf is as good as hidden. NaN that is visible makes its row
        NaN; what is hidden reaches neither result nor gradient. Probabilities below 2^-126 may be
        0. x is kept for the backward beside the result, for second derivatives.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Source: Milakov and Gimelshein, arXiv 1805.02867 (rows wider than the cache).
    """
    return _call(x, scale, mask, is_causal, dim, out, backend, False)


def log_softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool | str = False,
    dim: int = -1,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The logarithm of softmax: scale * x + mask, less the logarithm of the sum of its
    exponentials. Arguments, dtypes and errors are softmax's. What is hidden gives -inf, a row with
    nothing visible -inf everywhere; their gradient is 0, and their upstream gradient is ignored."""
    return _call(x, scale, mask, is_causal, dim, out, backend, True)


def _call(x, scale, mask, is_causal, dim, out, backend, log):
    if backend is not None:
        check_backend(backend)
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        check_float("x", x)
    dims, last = x.dim(), dim == -1
    if not last or not dims:
        last = _check_dim(dim, dims)
    if not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise number("scale", scale, "a finite number")
    causal = lower_right = False
    if is_causal is not False:
        causal, lower_right = _causal(is_causal, dims)
    if mask is not None:
        mask = _mask(mask, x)
    wide = (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and torch.is_autocast_enabled("cuda")
    )
    if out is not None:
        _check_out(out, x, mask, torch.float32 if wide else x.dtype)
    moved = x
    if not last:
        moved = x.movedim(dim, -1)
        mask = None if mask is None else mask.movedim(dim, -1)
    if dims > 4:
        moved, mask = _to_4d(moved, mask)
    scalars = (float(scale), causal, lower_right, log, wide)
    if out is not None:
        return _into(out, moved, mask, scalars, dim, backend)
    (y,) = _softmax((moved, mask), (), scalars, backend)
    if dims > 4:
        y = y.unflatten(0, _leading(x, dim))
    return y if last else y.movedim(-1, dim)


def _into(out, moved, mask, scalars, dim, backend):
    to = out.movedim(dim, -1)
    leading = to.shape[:-3]
    flat = to
    if to.dim() > 4:
        flat = to.flatten(0, -4)
    softmax_out(flat, moved.detach(), mask, *scalars, backend=backend)
    if flat.data_ptr() != to.data_ptr():
        to.copy_(flat.unflatten(0, leading))
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _leading(x: Tensor, dim: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape.append(shape.pop(dim))
    return tuple(shape[:-3])


def _check_dim(dim, dims: int) -> bool:
    """Whether dim is the last one."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if not dims:
        raise ValueError("x must have at least 1 dimension, got a scalar")
    if not -dims <= dim < dims:
        raise ValueError(f"dim must be in [{-dims}, {dims}), got {dim}")
    return dim in (-1, dims - 1)


def _causal(is_causal, dims: int) -> tuple[bool, bool]:
    if not isinstance(is_causal, (bool, str)) or is_causal not in _ALIGNMENTS:
        raise ValueError(
            f"is_causal must be False, True, 'upper_left' or 'lower_right', got {is_causal!r}"
        )
    if dims < 2:
        raise ValueError(f"is_causal needs rows: x must have at least 2 dimensions, got {dims}")
    return _ALIGNMENTS[is_causal]


def _mask(mask, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype is not torch.bool:
        if mask.dtype not in FLOATS:
            raise TypeError(
                f"mask must be bool (True: visible) or float32, bfloat16, float16 or float64 "
                f"(added), got {short(mask.dtype)}"
            )
        if mask.dtype is torch.float64 and x.dtype is not torch.float64:
            raise TypeError(f"mask must be float64 only where x is, got x of {short(x.dtype)}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on x's device {x.device}, got {mask.device}")
    shape, full = mask.shape, x.shape
    missing = len(full) - len(shape)
    if missing < 0 or any(
        m != 1 and m != n for m, n in zip(reversed(shape), reversed(full), strict=False)
    ):
        raise ValueError(f"mask must broadcast to x's shape {tuple(full)}, got {tuple(shape)}")
    return mask[(None,) * missing] if missing else mask


def _to_4d(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Leading dimensions as one: views where strides allow it."""
    if mask is not None:
        leading = mask.shape[:-3]
        if any(n != 1 for n in leading) and leading != x.shape[:-3]:
            mask = mask.expand(x.shape[:-3] + mask.shape[-3:])
        mask = mask.flatten(0, -4)
    return x.flatten(0, -4), mask


def _check_out(out, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor or None, got {type(out).__name__}")
    if out.shape != x.shape:
        raise ValueError(f"out must have x's shape {tuple(x.shape)}, got {tuple(out.shape)}")
    if out.dtype is not dtype:
        raise TypeError(f"out must be {short(dtype)}, got {short(out.dtype)}")
    if out.device != x.device:
        raise ValueError(f"out must be on x's device {x.device}, got {out.device}")
    if any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"out must have memory of its own for every element, got shape {tuple(out.shape)} with "
            f"strides {out.stride()}"
        )
    if torch.is_grad_enabled():
        for name, t in (("out", out), ("x", x), ("mask", mask)):
            if t is not None and t.requires_grad:
                raise ValueError(
                    f"{name} must not require grad where out is given, got requires_grad=True: "
                    f"call it under torch.no_grad()"
                )
