"""Attention to a cache of keys and values, and the append to it, in plain PyTorch."""

import torch
from torch import Tensor

from .attention import _group, _product


def _gather(cache: Tensor, block_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """The cache as [B, G, T, D] and which of its positions [B|1, T] have a page."""
    if block_table is None:
        return cache, torch.ones(1, cache.shape[2], dtype=torch.bool, device=cache.device)
    pages, _, page, _ = cache.shape
    known = (block_table >= 0) & (block_table < pages)
    held = cache.new_zeros((block_table.numel(), *cache.shape[1:]))
    rows = known.flatten().nonzero().flatten()
    held[rows] = cache[block_table.flatten()[rows].long()]
    held = held.unflatten(0, block_table.shape).transpose(1, 2).flatten(2, 3)
    return held, known.repeat_interleave(page, 1)


def attention_decode_math(
    q, k_cache, v_cache, lengths, start, block_table, slopes, positions, table, lut, scale, softcap,
    left, right, compute=None,
):  # fmt: skip
    """out, with the arguments of attention_decode_fwd. compute: the dtype of every step, fp32 where
    None (fp64 for fp64)."""
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    k, known = _gather(k_cache, block_table)
    v, _ = _gather(v_cache, block_table)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if (group := _group(q, k)) != 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    S, T = q.shape[2], k.shape[2]
    j = torch.arange(T, device=q.device)
    ends = lengths.long().clamp(0, T)[:, None, None]
    place = ends - S + torch.arange(S, device=q.device)[:, None]
    away = j - place
    visible = (j < ends) & (place >= 0) & known[:, None]
    if start is not None:
        visible &= j >= start[:, None, None]
    if left >= 0:
        visible &= away >= -left
    if right >= 0:
        visible &= away <= right
    x = scale * (q @ k.transpose(2, 3))
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    if slopes is not None:
        at = j if positions is None else positions[:, None, None, :]
        x = x + slopes.to(x.dtype)[:, :, None, None] * at.to(x.dtype)
    if table is not None:
        reach = (lut.numel() - 1) // 2
        buckets = lut[away.clamp(-reach, reach) + reach].long()
        x = x + table.to(x.dtype)[buckets].permute(0, 3, 1, 2)
    visible = visible[:, None].expand(x.shape)
    some = visible.any(-1, keepdim=True)
    x = x.masked_fill(~visible, -torch.inf).masked_fill(~some, 0)
    p = torch.where(visible, torch.softmax(x, -1), 0)
    return _product(p, v, visible)


def attention_decode_fwd(out, q, *args):
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        out.copy_(attention_decode_math(q, *args))


def cache_append_inplace(k_cache, v_cache, k, v, lengths, block_table):
    B, _, S, _ = k.shape
    T = k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[2]
    place = lengths.long()[:, None] - S + torch.arange(S, device=k.device)
    inside = (place >= 0) & (place < T)
    rows, tokens = inside.nonzero(as_tuple=True)
    place = place[rows, tokens]
    if block_table is None:
        owner = rows
    else:
        pages, _, page, _ = k_cache.shape
        owner = block_table[rows, place // page].long()
        known = (owner >= 0) & (owner < pages)
        rows, tokens, owner, place = rows[known], tokens[known], owner[known], place[known] % page
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[owner, :, place] = new[rows, :, tokens]
