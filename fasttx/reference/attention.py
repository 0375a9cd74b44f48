"""softmax(softcap(scale * q k^T) + bias + mask) v, in plain PyTorch and O(S x T) memory.

`attention_math` is differentiable to any order; `attention_fwd` and `attention_bwd` are the
backend, with the calling convention of fasttx/ops/attention.py. Statistics in fp32, in fp64 for
fp64 inputs.
"""

import torch
from torch import Tensor

from .philox import dropout_threshold, philox_mask


def visible_band(S: int, T: int, left: int, right: int, lower_right: bool, device) -> Tensor | None:
    """bool [S, T]: i + off - left <= j <= i + off + right; None where both sides are unbounded."""
    if left < 0 and right < 0:
        return None
    away = (
        torch.arange(T, device=device)
        - torch.arange(S, device=device)[:, None]
        - (T - S if lower_right else 0)
    )
    band = torch.ones_like(away, dtype=torch.bool)
    if left >= 0:
        band &= away >= -left
    if right >= 0:
        band &= away <= right
    return band


def relative_bias(table: Tensor, lut: Tensor, S: int, T: int, bias_shift: int) -> Tensor:
    """[H, S, T] from table [buckets, H]: the bucket of d = j - (i + T - S + bias_shift), clamped to
    lut's range."""
    return table[distance_buckets(lut, S, T, bias_shift)].permute(2, 0, 1)


def distance_buckets(lut: Tensor, S: int, T: int, bias_shift: int) -> Tensor:
    reach = (lut.numel() - 1) // 2
    away = (
        torch.arange(T, device=lut.device)
        - torch.arange(S, device=lut.device)[:, None]
        - (T - S + bias_shift)
    )
    return lut[away.clamp(-reach, reach) + reach].long()


def _logits(
    q, k, mask, slopes, positions, table, lut, scale, softcap, left, right, lower_right, bias_shift
):
    """Final logits with -inf where hidden, the visible pairs, and softcap's derivative; q k [B, H,
    ., D] of one dtype."""
    S, T = q.shape[2], k.shape[2]
    x = scale * (q @ k.transpose(2, 3))
    slope = None
    if softcap > 0:
        capped = torch.tanh(x / softcap)
        x, slope = softcap * capped, 1 - capped.square()
    if slopes is not None:
        at = torch.arange(T, device=q.device) if positions is None else positions[:, None, None, :]
        x = x + (slopes[:, :, None, None] * at).to(x.dtype)
    if table is not None:
        x = x + relative_bias(table.to(x.dtype), lut, S, T, bias_shift)
    visible = visible_band(S, T, left, right, lower_right, q.device)
    visible = torch.ones(S, T, dtype=torch.bool, device=q.device) if visible is None else visible
    if mask is not None and mask.dtype is torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask != -torch.inf)
        # A hidden pair's -inf must not meet the gradient of the sum.
        x = x + mask.masked_fill(mask == -torch.inf, 0).to(x.dtype)
    return x.masked_fill(~visible, -torch.inf), visible.expand(x.shape), slope


def _group(q: Tensor, k: Tensor) -> int:
    return q.shape[1] // k.shape[1] if k.shape[1] else 1


def _product(p: Tensor, v: Tensor, used: Tensor) -> Tensor:
    """p @ v, where a pair that is not used adds nothing even if v is not finite there."""
    if torch.isfinite(v).all():
        return p @ v
    return torch.where(used[..., None], p[..., None] * v[..., None, :, :], 0).sum(-2)


def _probabilities(x: Tensor, visible: Tensor, some: Tensor) -> Tensor:
    """Softmax over the visible keys; exp(x - lse) has lost its digits in a row of finite minima."""
    return torch.where(visible, torch.softmax(x.masked_fill(~some, 0), -1), 0)


def _dense_math(
    q,
    k,
    v,
    mask,
    slopes,
    positions,
    table,
    lut,
    seed,
    scale,
    softcap,
    dropout_p,
    left,
    right,
    lower_right,
    bias_shift,
    batch,
):
    if (group := _group(q, k)) != 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    x, visible, _ = _logits(
        q,
        k,
        mask,
        slopes,
        positions,
        table,
        lut,
        scale,
        softcap,
        left,
        right,
        lower_right,
        bias_shift,
    )
    some = visible.any(-1, keepdim=True)
    lse = torch.logsumexp(x.masked_fill(~some, 0), -1, keepdim=True)
    p = _probabilities(x, visible, some)
    lse = torch.where(some, lse, -torch.inf)
    used = visible
    if threshold := dropout_threshold(dropout_p):
        used = visible & philox_mask(seed, dropout_p, *x.shape, first_batch=batch)
        p = torch.where(used, p * (65536 / (65536 - threshold)), 0)
    return _product(p, v, used), lse.squeeze(-1)


def attention_math(
    q,
    k,
    v,
    mask,
    slopes,
    positions,
    table,
    lut,
    cu_q,
    cu_k,
    seed,
    scale,
    softcap,
    dropout_p,
    left,
    right,
    lower_right,
    bias_shift,
    compute=None,
):
    """(out, lse), differentiable; the arguments of attention_fwd. compute: the dtype of every step,
    fp32 where None (fp64 for fp64)."""
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    rest = (scale, softcap, dropout_p, left, right, lower_right, bias_shift)
    if cu_q is None:
        return _dense_math(q, k, v, mask, slopes, positions, table, lut, seed, *rest, 0)
    out, lse = q.new_zeros(q.shape[:3] + v.shape[3:]), q.new_full(q.shape[:3], -torch.inf)
    for s, (rows, keys) in enumerate(_sequences(cu_q, cu_k)):
        slope = slopes if slopes is None or slopes.shape[0] == 1 else slopes[s : s + 1]
        o, each = _dense_math(
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            None,
            slope,
            None,
            table,
            lut,
            seed,
            *rest,
            s,
        )
        out, lse = (
            out.slice_scatter(o, 2, rows.start, rows.stop),
            lse.slice_scatter(each, 2, rows.start, rows.stop),
        )
    return out, lse


def _sequences(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    a, b = cu_q.tolist(), cu_k.tolist()
    return [(slice(a[i], a[i + 1]), slice(b[i], b[i + 1])) for i in range(len(a) - 1)]


def attention_fwd(out, lse, q, *args):
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        o, statistics = attention_math(q, *args)
        out.copy_(o)
        lse.copy_(statistics)


def attention_bwd(
    dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse,
    mask, slopes, positions, table, lut, cu_q, cu_k, seed,
    scale, softcap, dropout_p, left, right, lower_right, bias_shift, need,
):  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    rest = (scale, softcap, dropout_p, left, right, lower_right, bias_shift)
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        widened = [t.to(wide) for t in (dout, q, k, v, out)]
        dlse = None if dlse is None else dlse.to(wide)
        if cu_q is None:
            grads = _dense_backward(
                *widened, dlse, mask, slopes, positions, table, lut, seed, *rest, 0
            )
        else:
            dout, q, k, v, out = widened
            grads = [torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None, None]
            for s, (rows, keys) in enumerate(_sequences(cu_q, cu_k)):
                r, c = (slice(None), slice(None), rows), (slice(None), slice(None), keys)
                slope = slopes if slopes is None or slopes.shape[0] == 1 else slopes[s : s + 1]
                dl = None if dlse is None else dlse[r]
                part = _dense_backward(
                    dout[r],
                    q[r],
                    k[c],
                    v[c],
                    out[r],
                    dl,
                    None,
                    slope,
                    None,
                    table,
                    lut,
                    seed,
                    *rest,
                    s,
                )
                for grad, where, value in zip(grads, (r, c, c), part, strict=False):
                    grad[where] = value
                if table is not None:
                    grads[4] = part[4] if grads[4] is None else grads[4] + part[4]
            if table is not None and grads[4] is None:
                grads[4] = torch.zeros_like(table)
        for bit, (result, grad) in enumerate(zip((dq, dk, dv, dmask, dtable), grads, strict=True)):
            if need >> bit & 1:
                result.copy_(grad)


def _dense_backward(
    dout, q, k, v, out, dlse, mask, slopes, positions, table, lut, seed,
    scale, softcap, dropout_p, left, right, lower_right, bias_shift, batch,
):  # fmt: skip
    group, G = _group(q, k), k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    x, visible, slope = _logits(
        q,
        k,
        mask,
        slopes,
        positions,
        table,
        lut,
        scale,
        softcap,
        left,
        right,
        lower_right,
        bias_shift,
    )
    p = _probabilities(x, visible, visible.any(-1, keepdim=True))
    dp, used, dropped = dout @ v.transpose(2, 3), visible, p
    if threshold := dropout_threshold(dropout_p):
        used = visible & philox_mask(seed, dropout_p, *x.shape, first_batch=batch)
        keep = 65536 / (65536 - threshold)
        dp, dropped = torch.where(used, dp * keep, 0), torch.where(used, p * keep, 0)
    delta = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse
    ds = torch.where(visible, p * (dp - delta[..., None]), 0)
    dv = _product(dropped.transpose(2, 3), dout, used.transpose(2, 3))
    dmask = None if mask is None or mask.dtype is torch.bool else ds.sum_to_size(mask.shape)
    dtable = None
    if table is not None:
        flat = distance_buckets(lut, *x.shape[2:], bias_shift).flatten()
        dtable = ds.new_zeros(table.shape).index_add_(0, flat, ds.sum(0).flatten(1).t())
    ds = scale * (ds if slope is None else torch.where(visible, ds * slope, 0))
    dq = _product(ds, k, visible)
    dk = _product(ds.transpose(2, 3), q, visible.transpose(2, 3))
    heads = lambda t: t.unflatten(1, (G, group)).sum(2)  # noqa: E731
    return dq, heads(dk), heads(dv), dmask, dtable
