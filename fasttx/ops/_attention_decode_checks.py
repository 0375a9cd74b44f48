"""What the doors of attention_decode and cache_append accept."""

import math

import torch
from torch import Tensor

from ._attention_checks import _alibi, _window
from ._checks import check_backend, check_float, has_values, number, short
from ._position_bias import ALiBi, RelativePositionBias


def checked_decode(
    q, k_cache, v_cache, cache_lengths, cache_start, block_table, is_causal, position_bias, window,
    scale, softcap, backend,
):  # fmt: skip
    """The inner op's arguments."""
    if backend is not None:
        check_backend(backend)
    check_float("q", q)
    device = q.device
    B, H, S, D = _shape("q", q, "[B, H, S, D]")
    T = _caches(k_cache, v_cache, block_table, B, device)
    q = _cast("q", q, k_cache)
    _, G, _, Dk = k_cache.shape
    if D == 0 or Dk != D:
        raise ValueError(
            f"q must have k_cache's head size {Dk}, at least 1, got shape {tuple(q.shape)}"
        )
    if (H % G if G else H) != 0:
        raise ValueError(f"k_cache must have a number of heads that divides q's {H}, got {G}")
    lengths = _int32("cache_lengths", cache_lengths, (B,), device)
    start = None if cache_start is None else _int32("cache_start", cache_start, (B,), device)
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    if scale is None:
        scale = D**-0.5
    elif not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise number("scale", scale, "a finite number or None")
    if softcap is None:
        softcap = 0.0
    elif not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf:
        raise number("softcap", softcap, "a finite number above 0 or None")
    left, right = (-1, -1) if window is None else _window(window)
    if is_causal:
        right = 0
    slopes = positions = table = lut = None
    if isinstance(position_bias, ALiBi):
        slopes, positions = _alibi(position_bias, B, H, T, None, device)
    elif isinstance(position_bias, RelativePositionBias):
        table, lut = _relative(position_bias, H, device)
    elif position_bias is not None:
        raise TypeError(
            f"position_bias must be fasttx.ALiBi, fasttx.RelativePositionBias or None, got "
            f"{type(position_bias).__name__}"
        )
    if torch.is_grad_enabled():
        given = (("q", q), ("k_cache", k_cache), ("v_cache", v_cache))
        for name, t in (*given, ("position_bias.weight", table)):
            if t is not None and t.requires_grad:
                raise ValueError(
                    f"{name} must not require grad, got requires_grad=True: attention_decode has "
                    f"no gradient; call it under torch.no_grad(), or call fasttx.attention"
                )
    ends = _check_lengths(lengths, T, k_cache, block_table)
    begins = start.tolist() if start is not None and has_values(start) else None
    if begins is not None:
        for b, (first, end) in enumerate(zip(begins, ends or [T] * B, strict=True)):
            if not 0 <= first <= end:
                raise ValueError(
                    f"cache_start must lie in [0, cache_lengths], got {first} at {b}, where "
                    f"cache_lengths is {end}"
                )
    _check_blocks(block_table, ends, begins, k_cache)
    return (
        q, k_cache, v_cache, lengths, start, block_table, slopes, positions, table, lut,
        float(scale), float(softcap), left, right,
    )  # fmt: skip


def checked_append(k_cache, v_cache, k, v, cache_lengths, block_table, backend):
    """The inner op's arguments."""
    check_backend(backend, ("cpu", "cuda", "triton", "reference"))
    check_float("k_cache", k_cache)
    check_float("k", k)
    check_float("v", v)
    B, G, S, D = _shape("k", k, "[B, G, S, D]")
    T = _caches(k_cache, v_cache, block_table, B, k_cache.device)
    for name, t, cache_name, cache in (("k", k, "k_cache", k_cache), ("v", v, "v_cache", v_cache)):
        if _shape(name, t, "[B, G, S, D]") != (B, cache.shape[1], S, cache.shape[3]):
            wanted = (B, cache.shape[1], S, cache.shape[3])
            raise ValueError(f"{name} must be {wanted} to fit {cache_name}, got {tuple(t.shape)}")
        if t.device != cache.device:
            raise ValueError(f"{name} must be on k_cache's device {cache.device}, got {t.device}")
        if cache.requires_grad:
            raise ValueError(
                f"{cache_name} must not require grad, got requires_grad=True: cache_append writes "
                f"in place and has no gradient"
            )
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad, got requires_grad=True: cache_append has no "
                f"gradient; call it under torch.no_grad()"
            )
        if any(n > 1 and s == 0 for n, s in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{cache_name} must have memory of its own for every element, got shape "
                f"{tuple(cache.shape)} with strides {cache.stride()}"
            )
    k, v = _cast("k", k, k_cache), _cast("v", v, k_cache)
    lengths = _int32("cache_lengths", cache_lengths, (B,), k_cache.device)
    ends = _check_lengths(lengths, T, k_cache, block_table)
    begins = None if ends is None else [max(0, end - S) for end in ends]
    _check_blocks(block_table, ends, begins, k_cache)
    return k_cache, v_cache, k, v, lengths, block_table


def _shape(name: str, t: Tensor, form: str) -> tuple[int, ...]:
    shape = t.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must be {form}, got shape {tuple(shape)}")
    return shape


def _caches(k_cache, v_cache, block_table, B: int, device: torch.device) -> int:
    """The number of positions that a sequence may have."""
    form = "[B, G, T_max, D]" if block_table is None else "[pages, G, page, D]"
    check_float("k_cache", k_cache)
    check_float("v_cache", v_cache)
    k_shape, v_shape = _shape("k_cache", k_cache, form), _shape("v_cache", v_cache, form)
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {t.device}")
    if v_cache.dtype is not k_cache.dtype:
        raise TypeError(
            f"v_cache must have k_cache's dtype {short(k_cache.dtype)}, got {short(v_cache.dtype)}"
        )
    if v_shape[:3] != k_shape[:3]:
        raise ValueError(
            f"v_cache must be {[*k_cache.shape[:3]]} and a head size, as k_cache, got shape "
            f"{tuple(v_cache.shape)}"
        )
    if block_table is None:
        if k_shape[0] != B:
            raise ValueError(f"k_cache must have a batch of {B}, got shape {tuple(k_shape)}")
        return k_shape[2]
    if not isinstance(block_table, Tensor):
        raise TypeError(
            f"block_table must be an int32 tensor [B, n] or None, got {type(block_table).__name__}"
        )
    if block_table.dtype is not torch.int32:
        raise TypeError(f"block_table must be int32, got {short(block_table.dtype)}")
    if block_table.dim() != 2 or block_table.shape[0] != B:
        raise ValueError(f"block_table must be [{B}, n], got shape {tuple(block_table.shape)}")
    if block_table.device != device:
        raise ValueError(f"block_table must be on q's device {device}, got {block_table.device}")
    if k_cache.shape[2] == 0:
        raise ValueError(
            f"k_cache must have pages of at least 1 position, got shape {tuple(k_cache.shape)}"
        )
    return block_table.shape[1] * k_cache.shape[2]


def _cast(name: str, t: Tensor, cache: Tensor) -> Tensor:
    """t in the cache's dtype, which autocast may bring about; the cache itself is never cast."""
    if t.dtype is cache.dtype:
        return t
    if torch.is_autocast_enabled(t.device.type):
        return t.to(cache.dtype)
    raise TypeError(f"{name} must have k_cache's dtype {short(cache.dtype)}, got {short(t.dtype)}")


def _int32(name: str, t, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be an int32 tensor [B], got {type(t).__name__}")
    if t.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {short(t.dtype)}")
    if t.shape != shape:
        raise ValueError(f"{name} must be [{shape[0]}], got shape {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {t.device}")
    return t


def _relative(bias: RelativePositionBias, H: int, device) -> tuple[Tensor, Tensor]:
    if bias.query_offset is not None:
        raise ValueError(
            f"position_bias.query_offset must be None, got {bias.query_offset}: cache_lengths "
            f"place the queries"
        )
    if bias.weight.shape[1] != H:
        raise ValueError(
            f"position_bias.weight must be [buckets, {H}], got shape {tuple(bias.weight.shape)}"
        )
    if bias.weight.device != device:
        raise ValueError(
            f"position_bias.weight must be on q's device {device}, got {bias.weight.device}"
        )
    return bias.weight, bias.buckets()


def _check_lengths(lengths: Tensor, T: int, k_cache: Tensor, block_table) -> list[int] | None:
    """The lengths, where they can be read for free."""
    if not has_values(lengths):
        return None
    ends = lengths.tolist()
    for b, end in enumerate(ends):
        if not 0 <= end <= T:
            room = f"T_max = {T}" if block_table is None else (
                f"n * page = {block_table.shape[1]} * {k_cache.shape[2]} = {T}"
            )  # fmt: skip
            raise ValueError(f"cache_lengths must lie in [0, {room}], got {end} at {b}")
    return ends


def _check_blocks(block_table, ends: list[int] | None, begins, k_cache: Tensor) -> None:
    """Every entry that a position in [begin, end) needs is a page of the cache."""
    if block_table is None or ends is None or not has_values(block_table):
        return
    pages, _, page, _ = k_cache.shape
    if not block_table.numel():
        return
    low, high = block_table.aminmax()
    if low.item() >= 0 and high.item() < pages:
        return
    begins = [0] * len(ends) if begins is None else begins
    for b, (begin, end, row) in enumerate(zip(begins, ends, block_table.tolist(), strict=True)):
        for i in range(begin // page, -(-end // page) if end > begin else 0):
            if not 0 <= row[i] < pages:
                raise ValueError(
                    f"block_table must hold pages in [0, {pages}) where cache_lengths need one, "
                    f"got {row[i]} at [{b}, {i}]"
                )
