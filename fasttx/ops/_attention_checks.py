"""What attention's door accepts: defaults, checks with messages, and flags turned into the inner
op's plain scalars."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    autocasts,
    check_backend,
    check_dropout,
    has_values,
    number,
    seed_tensor,
    short,
)
from ._position_bias import ALiBi, RelativePositionBias

_ALIGNMENTS = {False: None, True: False, "upper_left": False, "lower_right": True}
_NOTHING = (None,) * 6


def checked(
    query,
    key,
    value,
    attn_mask,
    dropout_p,
    is_causal,
    scale,
    position_bias,
    window,
    softcap,
    cu_seqlens,
    seed,
    backend,
) -> tuple[tuple, tuple, tuple, tuple | None]:
    """tensors (q, k, v, mask, table) in 4-D; rest (slopes, positions, lut, cu_q, cu_k, seed);
    scalars (scale, softcap, dropout_p, left, right, lower_right, bias_shift); leading: the
    dimensions to restore, None for 4-D input."""
    if backend is not None:
        check_backend(backend)
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    device = query.device
    if autocasts(device):
        query, key, value = (_autocast(t, device.type) for t in (query, key, value))
    dtype = query.dtype
    if dtype not in FLOATS:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {short(dtype)}")
    if key.dtype is not dtype or value.dtype is not dtype:
        raise TypeError(
            f"query, key and value must have one dtype, got {short(dtype)}, {short(key.dtype)} "
            f"and {short(value.dtype)}"
        )
    if key.device != device or value.device != device:
        raise ValueError(
            f"query, key and value must be on one device, got {device}, {key.device} and "
            f"{value.device}"
        )

    leading = None
    shapes = query.shape, key.shape, value.shape
    if not len(shapes[0]) == len(shapes[1]) == len(shapes[2]) == 4:
        leading, query, key, value = _to_4d(query, key, value)
        shapes = query.shape, key.shape, value.shape
    (B, H, S, D), (Bk, G, T, Dk), (Bv, Gv, Tv, _) = shapes
    if D == 0:
        raise ValueError(
            f"query must have a head size of at least 1, got shape {tuple(query.shape)}"
        )
    if Dk != D:
        raise ValueError(
            f"key must have query's head size {D}, got {Dk} in shape {tuple(key.shape)}"
        )
    if Gv != G or Tv != T:
        raise ValueError(
            f"value must have key's {G} heads and {T} keys, got shape {tuple(value.shape)}"
        )
    if (H % G if G else H) != 0:
        raise ValueError(f"key must have a number of heads that divides query's {H}, got {G}")
    if Bk != B or Bv != B:
        query, key, value = _broadcast_batch(query, key, value)
        B = query.shape[0]

    if scale is None:
        scale = D**-0.5
    elif not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise number("scale", scale, "a finite number or None")
    if softcap is None:
        softcap = 0.0
    elif not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf:
        raise number("softcap", softcap, "a finite number above 0 or None")
    if dropout_p != 0.0:
        check_dropout(dropout_p)
    if not isinstance(is_causal, (bool, str)) or is_causal not in _ALIGNMENTS:
        raise ValueError(
            f"is_causal must be False, True, 'upper_left' or 'lower_right', got {is_causal!r}"
        )
    lower_right = _ALIGNMENTS[is_causal]
    left, right = (-1, -1) if window is None else _window(window)
    if lower_right is not None:
        right = 0

    rest = _NOTHING
    mask, table, bias_shift = attn_mask, None, 0
    if cu_seqlens is not None or position_bias is not None or dropout_p:
        cu_q = cu_k = slopes = positions = lut = None
        sequences = None
        if cu_seqlens is not None:
            if attn_mask is not None:
                raise ValueError(
                    "attn_mask cannot be combined with cu_seqlens: each packed sequence is "
                    "visible to itself alone"
                )
            cu_q, cu_k = _packed(cu_seqlens, B, S, T, device)
            sequences = cu_q.shape[0] - 1
        if isinstance(position_bias, ALiBi):
            slopes, positions = _alibi(position_bias, B, H, T, sequences, device)
        elif isinstance(position_bias, RelativePositionBias):
            table, lut, bias_shift = _relative(position_bias, H, S, T, sequences, device)
        elif position_bias is not None:
            raise TypeError(
                f"position_bias must be fasttx.ALiBi, fasttx.RelativePositionBias or None, got "
                f"{type(position_bias).__name__}"
            )
        seed = seed_tensor(seed, device, "query") if dropout_p else None
        rest = (slopes, positions, lut, cu_q, cu_k, seed)
    if mask is not None:
        mask = _mask(mask, B, H, S, T, leading, device)
    scalars = (
        float(scale),
        float(softcap),
        float(dropout_p),
        left,
        right,
        bool(lower_right),
        bias_shift,
    )
    return (query, key, value, mask, table), rest, scalars, leading


def _autocast(t: Tensor, device_type: str) -> Tensor:
    return (
        t.to(torch.get_autocast_dtype(device_type))
        if t.is_floating_point() and t.dtype is not torch.float64
        else t
    )


def _to_4d(query: Tensor, key: Tensor, value: Tensor):
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise ValueError(
                f"{name} must have at least 2 dimensions [..., length, head size], got shape "
                f"{tuple(t.shape)}"
            )
        if t.dim() != query.dim():
            raise ValueError(
                f"{name} must have query's {query.dim()} dimensions, got shape {tuple(t.shape)}"
            )
    if query.dim() == 2:
        return (), query[None, None], key[None, None], value[None, None]
    if query.dim() == 3:
        return (query.shape[0],), query[None], key[None], value[None]
    outer = _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    flat = [t.expand(outer + t.shape[-3:]).flatten(0, -4) for t in (query, key, value)]
    return (*outer, query.shape[-3]), *flat


def _broadcast(*shapes) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        names = zip(("query", "key", "value"), shapes, strict=True)
        raise ValueError(
            "leading dimensions must broadcast, got "
            + ", ".join(f"{n} {tuple(s)}" for n, s in names)
        ) from None


def _broadcast_batch(query: Tensor, key: Tensor, value: Tensor):
    (batch,) = _broadcast(query.shape[:1], key.shape[:1], value.shape[:1])
    return tuple(t.expand(batch, -1, -1, -1) for t in (query, key, value))


def _window(window) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right) or None, got {window!r}")
    for side in window:
        if side is not None and (
            isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)) or side < 0
        ):
            raise ValueError(
                f"window must hold two of int >= 0 or None (unbounded), got {tuple(window)!r}"
            )
    return tuple(-1 if side is None else side for side in window)


def _mask(mask, B: int, H: int, S: int, T: int, leading: tuple | None, device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"attn_mask must be bool (True: visible) or floating (added), got {short(mask.dtype)}"
        )
    if mask.device != device:
        raise ValueError(f"attn_mask must be on query's device {device}, got {mask.device}")
    full = (B, H, S, T) if leading is None else (*leading, S, T)
    shape = tuple(mask.shape)
    if len(shape) > len(full) or any(
        m != 1 and m != n for m, n in zip(reversed(shape), reversed(full), strict=False)
    ):
        raise ValueError(f"attn_mask must broadcast to {full}, got shape {shape}")
    if leading is not None and len(leading) > 2:
        mask = mask.expand(leading[:-1] + mask.shape[-3:]) if mask.dim() >= 3 else mask
        mask = mask.flatten(0, -4) if mask.dim() > 4 else mask
    return mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask


def _packed(cu_seqlens, B: int, S: int, T: int, device) -> tuple[Tensor, Tensor]:
    pair = cu_seqlens if isinstance(cu_seqlens, (tuple, list)) else (cu_seqlens, cu_seqlens)
    if len(pair) != 2 or not all(isinstance(c, Tensor) for c in pair):
        raise TypeError(
            f"cu_seqlens must be a tensor [n + 1] or a pair of them for query and key, got "
            f"{cu_seqlens!r}"
        )
    if B != 1:
        raise ValueError(
            f"cu_seqlens needs a batch of 1, sequences one after the other, got batch {B}"
        )
    for name, cu, total in (("query", pair[0], S), ("key", pair[1], T)):
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {short(cu.dtype)}")
        if cu.dim() != 1 or cu.shape[0] < 1:
            raise ValueError(f"cu_seqlens must be [sequences + 1], got shape {tuple(cu.shape)}")
        if cu.device != device:
            raise ValueError(f"cu_seqlens must be on query's device {device}, got {cu.device}")
        if has_values(cu):
            bounds = cu.tolist()
            if bounds[0] != 0 or any(b < a for a, b in pairwise(bounds)):
                raise ValueError(f"cu_seqlens must start at 0 and never fall, got {bounds}")
            if bounds[-1] > total:
                raise ValueError(
                    f"cu_seqlens must end at or before {name}'s length {total}, got {bounds}"
                )
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"cu_seqlens must bound as many sequences for query as for key, got "
            f"{pair[0].shape[0] - 1} and {pair[1].shape[0] - 1}"
        )
    return tuple(c.to(torch.int32).contiguous() for c in pair)


def _alibi(
    bias: ALiBi, B: int, H: int, T: int, sequences: int | None, device
) -> tuple[Tensor, Tensor | None]:
    slopes, positions = bias.slopes, bias.positions
    rows = B if sequences is None else sequences
    slopes = slopes[None] if slopes.dim() == 1 else slopes
    if slopes.shape[1] != H or slopes.shape[0] not in (1, rows):
        raise ValueError(
            f"position_bias.slopes must be [{H}] or [{rows}, {H}], got shape "
            f"{tuple(bias.slopes.shape)}"
        )
    if slopes.device != device:
        raise ValueError(
            f"position_bias.slopes must be on query's device {device}, got {slopes.device}"
        )
    if positions is not None:
        if sequences is not None:
            raise ValueError(
                "position_bias.positions cannot be combined with cu_seqlens: positions restart in "
                "each packed sequence"
            )
        positions = positions[None] if positions.dim() == 1 else positions
        if positions.shape[1] != T or positions.shape[0] not in (1, B):
            raise ValueError(
                f"position_bias.positions must be [{T}] or [{B}, {T}], got shape "
                f"{tuple(bias.positions.shape)}"
            )
        if positions.device != device:
            raise ValueError(
                f"position_bias.positions must be on query's device {device}, got "
                f"{positions.device}"
            )
        positions = positions.detach().to(torch.float32)
    return slopes.to(torch.float32), positions


def _relative(
    bias: RelativePositionBias, H: int, S: int, T: int, sequences: int | None, device
) -> tuple[Tensor, Tensor, int]:
    if bias.weight.shape[1] != H:
        raise ValueError(
            f"position_bias.weight must be [buckets, {H}], got shape {tuple(bias.weight.shape)}"
        )
    if bias.weight.device != device:
        raise ValueError(
            f"position_bias.weight must be on query's device {device}, got {bias.weight.device}"
        )
    shift = 0
    if bias.query_offset is not None:
        if sequences is not None:
            raise ValueError(
                f"position_bias.query_offset must be None with cu_seqlens, got {bias.query_offset}"
            )
        shift = bias.query_offset - (T - S)
    return bias.weight, bias.buckets(), shift
