"""dropout(norm(token + position + segment row)) in plain PyTorch.

`embed_math` is differentiable to any order; `embed_fwd` and `embed_bwd` are the backend, with the
calling convention of fasttx/ops/embed.py. Sums and statistics in fp32, in fp64 for fp64 tables.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .add_norm import add_norm_bwd, add_norm_math, kept
from .philox import dropout_threshold


def _all_ids(input_ids, segment_ids, position_ids, start) -> tuple[Tensor, Tensor, Tensor]:
    """The ids of the three tables, [B, S]."""
    if position_ids is None:
        S = input_ids.shape[1]
        position_ids = torch.arange(start, start + S, device=input_ids.device).expand_as(input_ids)
    if segment_ids is None:
        segment_ids = torch.zeros_like(input_ids)
    return input_ids, position_ids, segment_ids


def _outside(ids: Tensor, rows: int) -> Tensor:
    return (ids < 0) | (ids >= rows)


def _rows(table: Tensor, ids: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
    """table[ids] in dtype, NaN where an id is out of range; no gradient to row `padding`."""
    bad = _outside(ids, table.shape[0])
    if not table.shape[0]:
        return table.new_full((*ids.shape, table.shape[1]), torch.nan, dtype=dtype)
    safe = ids.masked_fill(bad, 0)
    rows = F.embedding(safe, table.to(dtype), padding if padding >= 0 else None)
    return rows.masked_fill(bad[..., None], torch.nan)


def _sum(tables, ids, paddings, scale, dtype) -> Tensor:
    z = _rows(tables[0], ids[0], paddings[0], dtype) * scale
    for table, which, padding in zip(tables[1:], ids[1:], paddings[1:], strict=True):
        if table is not None:
            z = z + _rows(table, which, padding, dtype)
    return z


def embed_math(
    token_weight, position_weight, segment_weight, norm_weight, norm_bias, input_ids, segment_ids,
    position_ids, seed, start, padding_idx, position_padding, norm, scale, eps, dropout_p, wide,
    compute=None,
):  # fmt: skip
    """(out, stats), differentiable; the arguments of embed_fwd. compute: the dtype of every step,
    fp32 where None (fp64 for fp64)."""
    dtype = compute or torch.promote_types(token_weight.dtype, torch.float32)
    ids = _all_ids(input_ids, segment_ids, position_ids, start)
    tables = (token_weight, position_weight, segment_weight)
    out = _sum(tables, ids, (padding_idx, position_padding, -1), scale, dtype)
    stats = out.new_empty((0, input_ids.numel()))
    if norm:
        out, _, stats = add_norm_math(
            out, None, norm_weight, norm_bias, None, None, eps, 0.0, norm == 2, False, wide, dtype
        )
    if dropout_threshold(dropout_p):
        keep, factor = kept(out, seed, dropout_p)
        out = torch.where(keep, out * factor, 0)
    return out, stats


def embed_fwd(out, stats, token_weight, *args):
    with torch.autocast(token_weight.device.type, enabled=False), torch.no_grad():
        for result, value in zip((out, stats), embed_math(token_weight, *args), strict=True):
            result.copy_(value)


def embed_bwd(
    dtoken, dposition, dsegment, dnorm_weight, dnorm_bias,
    token_weight, position_weight, segment_weight, norm_weight, norm_bias, stats, dout,
    input_ids, segment_ids, position_ids, seed,
    start, padding_idx, position_padding, norm, scale, dropout_p, need,
):  # fmt: skip
    wide = torch.promote_types(token_weight.dtype, torch.float32)
    with torch.autocast(token_weight.device.type, enabled=False), torch.no_grad():
        ids = _all_ids(input_ids, segment_ids, position_ids, start)
        tables = (token_weight, position_weight, segment_weight)
        dz = dout.to(wide)
        if dropout_threshold(dropout_p):
            keep, factor = kept(dz, seed, dropout_p)
            dz = torch.where(keep, dz * factor, 0)
        if norm:
            z = _sum(tables, ids, (-1, -1, -1), scale, wide)
            upstream, dz = dz, torch.empty_like(z)
            add_norm_bwd(
                dz, None, dnorm_weight, dnorm_bias, None, z, stats, upstream, None, None,
                norm_weight, norm_bias, None, None, 0.0, norm == 2, 1 | (need >> 1 & 12),
            )  # fmt: skip
        dz = dz.reshape(-1, dz.shape[-1]) if dz.numel() else dz.new_zeros((0, dz.shape[-1]))
        paddings = (padding_idx, position_padding, -1)
        for bit, result in enumerate((dtoken, dposition, dsegment)):
            if need >> bit & 1:
                which = ids[bit].reshape(-1)
                used = ~_outside(which, tables[bit].shape[0]) & (which != paddings[bit])
                if not result.numel():
                    continue
                total = torch.zeros(result.shape, dtype=wide, device=result.device)
                total.index_put_((which[used],), dz[used], accumulate=True)
                result.copy_(total if bit else total * scale)
