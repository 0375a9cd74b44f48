"""p = exp(logits - lse): attention's probabilities of chosen heads and query rows, or averages of
them, from a saved lse.

Shapes, below the door: q [B,H,S,D], k [B,G,T,D], lse [B,H,S] float32 (float64 beside float64);
heads int64 [h] and rows int64 [r], or None for all. The logits and what shapes them (mask, slopes,
positions, table, lut and the scalars) are attention_fwd's. The result is float32 (float64)
[B,h,r,T], hidden pairs 0; with pool > 0 [B,h,pool,pool], cell (x, y) the mean over the chosen rows
floor(x r / pool) .. ceil((x + 1) r / pool) - 1 and the keys floor(y T / pool) .. ceil((y + 1) T /
pool) - 1, 0 where there are none. A head or row that does not exist gives NaN. No gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..op import Kernel, Needs, Op
from ._attention_checks import checked
from ._checks import check_backend, check_float, has_values, short
from ._position_bias import ALiBi, RelativePositionBias

__all__ = ["attention_map", "attention_map_fwd"]


@Op
def attention_map_fwd(
    q: Tensor, k: Tensor, lse: Tensor, heads: Tensor | None, rows: Tensor | None,
    mask: Tensor | None, slopes: Tensor | None, positions: Tensor | None, table: Tensor | None,
    lut: Tensor | None, scale: float, softcap: float, left: int, right: int, lower_right: bool,
    bias_shift: int, pool: int,
) -> Tensor:  # fmt: skip
    B, H, S, _ = q.shape
    H = H if heads is None else heads.shape[0]
    S = S if rows is None else rows.shape[0]
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty((B, H, pool, pool) if pool else (B, H, S, k.shape[2]), dtype=dtype)


_HEADS = {"q.3": (1, 256)}
_own = Needs(sizes=_HEADS, absent=("mask", "slopes", "table", "softcap"), by_name=True)
_triton = "fasttx.kernels.attention_map:attention_map_fwd"
_reference = Kernel(
    "reference", "fasttx.reference.attention_map:attention_map_fwd", Needs(dtypes=None)
)
attention_map_fwd.kernels(
    cpu=[
        Kernel("cpu", "native:attention_map_fwd_cpu", Needs(sizes=_HEADS)),
        Kernel("triton", _triton, Needs(sizes=_HEADS, env=("TRITON_INTERPRET", "1"), by_name=True)),
        Kernel("torch", "fasttx.reference.torch_own:attention_map_fwd", _own),
        _reference,
    ],
    cuda=[Kernel("triton", _triton, Needs(sizes=_HEADS, sm=80)), _reference],
)


def attention_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    heads: Sequence[int] | slice | Tensor | None = None,
    rows: Sequence[int] | slice | Tensor | None = None,
    pool: int | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool | str = False,
    scale: float | None = None,
    position_bias: ALiBi | RelativePositionBias | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention's probabilities, as far as one wants to see them: exp(logits - lse) of chosen heads
    and query rows, or their averages over a pool x pool grid, without the S x T matrix.

    Args:
        q: [..., H, S, D], float32, bfloat16, float16 (float64 by the reference), any strides.
        k: [..., G, T, D] with H % G == 0, as attention's key.
        lse: [..., H, S], what fasttx.attention(..., return_lse=True) returned for these arguments;
            float32 (float64 beside float64).
        heads: which heads, of [0, H): ints in any order, a slice, or an int tensor; None is all.
        rows: which query rows, of [0, S), likewise.
        pool: None, or at least 1: the mean over each cell of a pool x pool grid laid over the
            chosen rows and all keys, as torch's adaptive_avg_pool2d of the map.
        attn_mask, is_causal, scale, position_bias, window, softcap: those of the call of
            fasttx.attention that gave lse.
        backend: None chooses; "cpu", "triton", "torch" (PyTorch's plain operations on the CPU,
            without mask, bias and softcap) or "reference" runs that or raises with every kernel's
            reason.

    Returns:
        float32 (float64 for float64) [..., h, r, T], or [..., h, pool, pool]. Rows sum to 1 as far
        as lse is exact: to its rounding in float32, to about 1e-3 for 16-bit q. What is hidden is
        0, a row with no visible key is 0 throughout. Dropout is not in it. The extra memory is a
        tile and O(S + T) a head; the reference computes the whole map.

    Raises:
        TypeError, ValueError: naming argument, value and what is allowed, before anything runs; a
            tensor that requires grad too: the map is not differentiable. Call it under
            torch.no_grad(). A head or row out of range in a tensor on a GPU gives NaN instead.
        NotImplementedError: no kernel supports the call, with each kernel's reason.

    Source: Dao, arXiv 2307.08691 (probabilities again from lse).
    """
    check_backend(backend)
    _check_operands(q, k, lse)
    if pool is not None and (isinstance(pool, bool) or not isinstance(pool, int)):
        raise TypeError(f"pool must be an int or None, got {pool!r}")
    if pool is not None and pool < 1:
        raise ValueError(f"pool must be at least 1 or None, got {pool}")
    (q, k, _, mask, table), (slopes, positions, lut, *_), scalars, leading = checked(
        q, k, k, attn_mask, 0.0, is_causal, scale, position_bias, window, softcap, None, None, None
    )
    scale, softcap, _, left, right, lower_right, shift = scalars
    B, H, S, _ = q.shape
    full = (B, H, S) if leading is None else (*leading, S)
    if tuple(lse.shape) != full:
        raise ValueError(f"lse must have shape {full}, got {tuple(lse.shape)}")
    if torch.is_grad_enabled():
        given = (("q", q), ("k", k), ("lse", lse), ("attn_mask", mask))
        for name, t in (*given, ("position_bias.weight", table)):
            if t is not None and t.requires_grad:
                raise ValueError(
                    f"{name} must not require grad, got requires_grad=True: attention_map has no "
                    f"gradient; call it under torch.no_grad()"
                )
    if leading == () and heads is not None:
        raise ValueError(f"heads must be None where q has no dimension of heads, got {heads!r}")
    chosen = _indices("heads", heads, H, q.device), _indices("rows", rows, S, q.device)
    p = attention_map_fwd(
        q, k, lse.reshape(B, H, S), *chosen, mask, slopes, positions, table, lut,
        scale, softcap, left, right, lower_right, shift, pool or 0, backend=backend,
    )  # fmt: skip
    if leading is None:
        return p
    return p.reshape((*leading[:-1], *p.shape[1:]) if leading else p.shape[2:])


def _check_operands(q, k, lse) -> None:
    for name, t in (("q", q), ("k", k), ("lse", lse)):
        check_float(name, t)
        if t.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {t.device}")
    if k.dtype is not q.dtype:
        raise TypeError(f"k must have q's dtype {short(q.dtype)}, got {short(k.dtype)}")
    wanted = torch.float64 if q.dtype is torch.float64 else torch.float32
    if lse.dtype is not wanted:
        raise TypeError(
            f"lse must be {short(wanted)} beside {short(q.dtype)}, got {short(lse.dtype)}"
        )
    if q.dim() < 2:
        raise ValueError(
            f"q must have at least 2 dimensions [..., S, D], got shape {tuple(q.shape)}"
        )
    if k.dim() != q.dim():
        raise ValueError(f"k must have q's {q.dim()} dimensions, got shape {tuple(k.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head size {q.shape[-1]}, got shape {tuple(k.shape)}")
    if q.dim() > 2:
        H, G = q.shape[-3], k.shape[-3]
        if (H % G if G else H) != 0:
            raise ValueError(f"k must have a number of heads that divides q's {H}, got {G}")


def _indices(name: str, chosen, limit: int, device: torch.device) -> Tensor | None:
    """int64 [n], checked where its values can be read for free."""
    if chosen is None:
        return None
    if isinstance(chosen, slice):
        chosen = range(*chosen.indices(limit))
    if isinstance(chosen, Tensor):
        if chosen.dtype not in (torch.int32, torch.int64) or chosen.dim() != 1:
            raise TypeError(
                f"{name} must be an int32 or int64 tensor [n], got {short(chosen.dtype)} of shape "
                f"{tuple(chosen.shape)}"
            )
        if chosen.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {chosen.device}")
        values = chosen.tolist() if has_values(chosen) else ()
        index = chosen.to(torch.int64)
    elif isinstance(chosen, (list, tuple, range)):
        values, index = chosen, None
    else:
        raise TypeError(
            f"{name} must be a sequence of ints, a slice, an int tensor or None, got {chosen!r}"
        )
    for i in values:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"{name} must hold ints, got {i!r}")
        if not 0 <= i < limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got {i}")
    if index is None:
        return torch.tensor(list(values), dtype=torch.int64, device=device)
    return index
