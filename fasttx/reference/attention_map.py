"""exp(logits - lse) in plain PyTorch and O(S x T) memory: the backend of attention_map."""

import torch
from torch import Tensor

from .attention import _group, _logits


def _take(p: Tensor, dim: int, index: Tensor | None) -> Tensor:
    """Chosen slices along a dimension, NaN where there is none."""
    if index is None:
        return p
    n = p.shape[dim]
    inside = ((index >= 0) & (index < n)).view(-1, *(1,) * (3 - dim))
    if n == 0:
        return p.new_full((*p.shape[:dim], index.numel(), *p.shape[dim + 1 :]), torch.nan)
    return p.index_select(dim, index.clamp(0, n - 1)).masked_fill(~inside, torch.nan)


def attention_map_math(
    q, k, lse, heads, rows, mask, slopes, positions, table, lut, scale, softcap, left, right,
    lower_right, bias_shift, pool, compute=None,
):  # fmt: skip
    """The map; the arguments of attention_map_fwd. compute: the dtype of every step, fp32 where
    None (fp64 for fp64)."""
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    k = k.repeat_interleave(_group(q, k), 1)
    x, visible, _ = _logits(
        q, k, mask, slopes, positions, table, lut, scale, softcap, left, right, lower_right,
        bias_shift,
    )  # fmt: skip
    p = torch.where(visible, (x - lse.to(wide)[..., None]).exp(), 0)
    p = _take(_take(p, 1, heads), 2, rows)
    if not pool:
        return p
    if not p.shape[2] * p.shape[3]:
        return p.new_zeros(*p.shape[:2], pool, pool)
    return torch.nn.functional.adaptive_avg_pool2d(p, pool)


def attention_map_fwd(out, q, *args):
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        out.copy_(attention_map_math(q, *args))
