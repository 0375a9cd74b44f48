"""Rotary position embedding: the columns of a head, in pairs, turned by an angle of the position.

    y_a = x_a cos_a - x_b sin_a,     y_b = x_b cos_b + x_a sin_b

for the pairs (a, b) of the first R columns: (i, R/2 + i) as in GPT-NeoX and Llama, or interleaved
(2i, 2i + 1) as in GPT-J; the other columns stay. Below the door q [B,H,S,D] and k [B,G,S,D] (or
None), any strides; cos and sin [B|1,S,R] or, an angle for each pair, [B|1,S,R/2]. Computed in
float32 (float64 for float64) and rounded once.

The rotation is linear and its backward the transposed one, cos and sin's alone: x_a = y_a cos_a +
y_b sin_b, x_b = y_b cos_b - y_a sin_a. So neither direction keeps q or k, and derivatives of any
order are rotations again.

Source: Su et al., arXiv 2104.09864.
"""

import functools

import torch
from torch import Tensor

from ..op import HALF, Kernel, Needs, Op
from ._checks import FLOATS, check_backend, check_float, short

__all__ = ["rope", "rope_bwd", "rope_fwd", "rope_inplace"]


def _like(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


@Op
def rope_fwd(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like(q, k)


@Op
def rope_bwd(
    dq_out: Tensor, dk_out: Tensor | None, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of q and k."""
    return _like(dq_out, dk_out)


@functools.partial(Op, mutates=("q", "k"))
def rope_inplace(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool
) -> None:  # fmt: skip
    """q and k become what rope_fwd returns."""


rope_fwd.backward = rope_bwd
for _op in (rope_fwd, rope_bwd, rope_inplace):
    _of = "dq_out" if _op is rope_bwd else "q"
    _triton = f"fasttx.kernels.rope:{_op.name}"
    _unfused = Kernel(
        "torch", f"fasttx.reference.unfused:{_op.name}", Needs(dtype_of=_of, by_name=True)
    )
    _reference = Kernel("reference", f"fasttx.reference.rope:{_op.name}", Needs(dtypes=None))
    _op.kernels(
        cpu=[
            Kernel("cpu", f"native:{_op.name}_cpu", Needs(dtype_of=_of)),
            Kernel(
                "triton",
                _triton,
                Needs(dtype_of=_of, env=("TRITON_INTERPRET", "1"), by_name=True),
            ),
            _unfused,
            _reference,
        ],
        cuda=[
            Kernel("triton", _triton, Needs(dtype_of=_of, sm=80)),
            Kernel("cuda", f"native:{_op.name}_cuda", Needs(HALF, dtype_of=_of, sm=80)),
            _unfused,
            _reference,
        ],
    )


def _rotate(q, k, angles, scalars, adjoint, backend):
    """Both rotated, differentiable in q and k (or None); adjoint: the transposed rotation."""
    if torch._C._are_functorch_transforms_active():
        return _RotateTransformed.apply(angles, scalars, adjoint, backend, q, k)
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
        return _Rotate.apply(angles, scalars, adjoint, backend, q, k)
    op = rope_bwd if adjoint else rope_fwd
    return op(q, k, *angles, *scalars, backend=backend)


def _keep(ctx, angles, scalars, adjoint, backend):
    ctx.save_for_backward(*angles)
    ctx.scalars, ctx.adjoint, ctx.backend = scalars, adjoint, backend
    ctx.set_materialize_grads(False)


def _gradients(ctx, *upstream):
    wanted = [g if n else None for g, n in zip(upstream, ctx.needs_input_grad[4:], strict=True)]
    given = [g for g in wanted if g is not None]
    found = []
    if given:
        first, second = given if len(given) == 2 else (given[0], None)
        rest = (ctx.saved_tensors, ctx.scalars)
        if torch.compiler.is_compiling():
            op = rope_fwd if ctx.adjoint else rope_bwd
            found = list(op(first, second, *rest[0], *rest[1], backend=ctx.backend))
        else:
            found = list(_rotate(first, second, *rest, not ctx.adjoint, ctx.backend))
    return None, None, None, None, *(None if g is None else found.pop(0) for g in wanted)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, angles, scalars, adjoint, backend, q, k):
        _keep(ctx, angles, scalars, adjoint, backend)
        return (rope_bwd if adjoint else rope_fwd)(q, k, *angles, *scalars, backend=backend)

    backward = staticmethod(_gradients)


class _RotateTransformed(torch.autograd.Function):
    generate_vmap_rule = True
    backward = staticmethod(_gradients)

    @staticmethod
    def forward(angles, scalars, adjoint, backend, q, k):
        return (rope_bwd if adjoint else rope_fwd)(q, k, *angles, *scalars, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, *inputs[:4])


class _RotateInPlace(torch.autograd.Function):
    """One tensor: autograd allows a Function no second output where it changes a view."""

    @staticmethod
    def forward(ctx, angles, scalars, backend, x):
        rope_inplace(x, None, *angles, *scalars, backend=backend)
        ctx.mark_dirty(x)
        _keep(ctx, angles, scalars, False, backend)
        return x

    @staticmethod
    def backward(ctx, dx):
        if dx is None:
            return None, None, None, None
        rotated = _rotate(dx, None, ctx.saved_tensors, ctx.scalars, True, ctx.backend)
        return None, None, None, rotated[0]


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    rotary_dim: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k with rotary position embedding: x * cos + turned(x) * sin on the first columns of
    every head, in one pass over memory.

    turned(x) puts (-x_b, x_a) in the place of each pair (x_a, x_b): columns i and R/2 + i
    (rotate_half of GPT-NeoX and Llama), or 2i and 2i + 1 (GPT-J).

    Args:
        q: [B, H, S, D], float32, bfloat16, float16 (float64 by the reference), any strides: the
            transposed view of a projection's [B, S, H, D] needs no copy.
        k: [B, G, S, D] in q's dtype, any number of heads G, any strides.
        cos, sin: [S, R], [1, S, R] or [B, S, R] with even R <= D, one for each of the R first
            columns: what transformers' rotary embeddings return, and for GPT-J's order each angle
            twice side by side. With rotary_dim = 2 * width one for each pair. Any strides, both in
            one dtype, 16-bit or float32 whatever q's (float64 exactly where q is).
        interleaved: pairs of neighbours (GPT-J) instead of halves.
        inplace: q and k themselves are overwritten and returned; each must have memory of its own
            for every element. Right under autograd: neither is needed for the backward, and what
            was saved elsewhere from the old values raises there.
        rotary_dim: R; None is the width of cos and sin. D - R columns pass through.
        backend: None chooses; "cpu", "cuda", "triton", "torch" (PyTorch's plain operations in q's
            dtype) or "reference" runs that or raises with every kernel's reason.

    Returns:
        (q, k) rotated, in their dtype and memory order. Gradients of any order exist for q and k,
        none for cos and sin.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs;
            for cos or sin that require grad too.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Source: Su et al., arXiv 2104.09864; the interleaved form is the paper's.
    """
    check_backend(backend)
    angles, rotary = _checked(q, k, cos, sin, rotary_dim)
    scalars = (rotary, bool(interleaved))
    if not inplace:
        return _rotate(q, k, angles, scalars, False, backend)
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    _check_writable(q, k)
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or (graph and torch.compiler.is_compiling()):
        for x, rotated in zip((q, k), _rotate(q, k, angles, scalars, False, backend), strict=True):
            x.copy_(rotated)
    elif graph:
        for x in (q, k):
            if x.requires_grad:
                _RotateInPlace.apply(angles, scalars, backend, x)
            else:
                rope_inplace(x, None, *angles, *scalars, backend=backend)
                torch.autograd.graph.increment_version(x)
    else:
        rope_inplace(q, k, *angles, *scalars, backend=backend)
        if not torch.compiler.is_compiling():
            for x in (q, k):
                if not x.is_inference():
                    torch.autograd.graph.increment_version(x)
    return q, k


def _checked(q, k, cos, sin, rotary_dim) -> tuple[tuple[Tensor, Tensor], int]:
    """cos and sin as [B|1, S, R] or [B|1, S, R/2], and R."""
    check_float("q", q)
    check_float("k", k)
    if q.dim() != 4:
        raise ValueError(f"q must be [B, H, S, D], got shape {tuple(q.shape)}")
    B, _, S, D = q.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k must be [{B}, G, {S}, {D}] as q is, got shape {tuple(k.shape)}")
    if k.dtype is not q.dtype:
        raise TypeError(f"k must have q's dtype {short(q.dtype)}, got {short(k.dtype)}")
    if k.device != q.device:
        raise ValueError(f"k must be on q's device {q.device}, got {k.device}")
    kindred = FLOATS - {torch.float64} if q.dtype is not torch.float64 else {torch.float64}
    for name, t in (("cos", cos), ("sin", sin)):
        check_float(name, t)
        if t.dtype not in kindred:
            raise TypeError(
                f"{name} must be float64 exactly where q is, got {short(t.dtype)} beside "
                f"{short(q.dtype)}"
            )
        if t.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {t.device}")
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad, got requires_grad=True: rope gives cos and sin no "
                f"gradient; detach it, or write q * cos + turned(q) * sin out"
            )
    shape = tuple(cos.shape)
    if len(shape) not in (2, 3) or shape[-2] != S or (len(shape) == 3 and shape[0] not in (1, B)):
        raise ValueError(f"cos must be [{S}, R], [1, {S}, R] or [{B}, {S}, R], got shape {shape}")
    if sin.shape != cos.shape or sin.dtype is not cos.dtype:
        raise ValueError(
            f"sin must have cos's shape and dtype {shape} {short(cos.dtype)}, got "
            f"{tuple(sin.shape)} {short(sin.dtype)}"
        )
    width = shape[-1]
    if rotary_dim is None:
        rotary, allowed = width, f"an even width of at most D={D}"
        if width % 2 or width > D:
            raise ValueError(f"cos must have {allowed}, got shape {shape}")
    elif isinstance(rotary_dim, bool) or not isinstance(rotary_dim, int):
        raise TypeError(f"rotary_dim must be an int or None, got {rotary_dim!r}")
    else:
        rotary = rotary_dim
        if rotary not in (width, 2 * width) or rotary % 2 or rotary > D:
            raise ValueError(
                f"rotary_dim must be even, at most D={D} and once or twice the width {width} of "
                f"cos and sin, got {rotary}"
            )
    if len(shape) == 2:
        return (cos[None], sin[None]), rotary
    return (cos, sin), rotary


def _check_writable(q: Tensor, k: Tensor) -> None:
    if q is k:
        raise ValueError("inplace needs q and k of their own, got one tensor for both")
    graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    for name, x in (("q", q), ("k", k)):
        if any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"inplace needs {name} with memory of its own for every element, got shape "
                f"{tuple(x.shape)} with strides {x.stride()}"
            )
        if not (graph and x.requires_grad):
            continue
        if x.is_leaf:
            raise ValueError(f"inplace cannot overwrite {name}, a leaf that requires grad")
        meta = torch._C._autograd
        if x._is_view() and meta._get_creation_meta(x) != meta.CreationMeta.DEFAULT:
            raise ValueError(
                f"inplace cannot overwrite {name}, a view that autograd cannot follow (one of "
                f"several that split, chunk or unbind returned, or made without gradients): take "
                f"it by a slice"
            )
