"""PyTorch's own kernels for the CPU: a backend, "torch", where these were measured to be faster
(fasttx/choice.py).

The calling conventions and the meaning are those of fasttx/ops; what PyTorch's kernels would do
otherwise (a row of -inf, values that are not finite behind a causal band, windows) is left to the
reference.
"""

import torch
from torch import Tensor

from . import add_norm as norm_reference
from . import attention as reference
from . import attention_decode as decode_reference
from . import attention_map as map_reference
from . import embed as embed_reference
from . import softmax as softmax_reference
from .unfused import plain


def softmax_fwd(out, x, mask, scale, causal, lower_right, log, wide):
    with plain(x):
        z = x if scale == 1 else x * scale
        if z.data_ptr() == out.data_ptr():
            z = x.clone()
        own = torch.ops.aten._log_softmax if log else torch.ops.aten._softmax
        if out.is_contiguous():
            own.out(z, -1, False, out=out)
        else:  # which PyTorch's kernel takes every out for
            out.copy_(own(z, -1, False))
        # PyTorch's NaN for a row of -inf is 0 here.
        if out[..., :1].isnan().any():
            nothing = (z == -torch.inf).all(-1, keepdim=True)
            out.masked_fill_(nothing, -torch.inf if log else 0)


def softmax_bwd(dx, dmask, dout, out, x, mask, scale, causal, lower_right, log, need):
    with plain(x):
        # What is hidden takes part in nothing here: -inf in a logarithm, NaN behind a 0.
        if not (out if log else dout).isfinite().all():
            args = (dout, out, x, mask, scale, causal, lower_right, log, need)
            return softmax_reference.softmax_bwd(dx, dmask, *args)
        if need & 1:
            aten = torch.ops.aten
            own = aten._log_softmax_backward_data if log else aten._softmax_backward_data
            if dx.is_contiguous():
                own.out(dout, out, -1, x.dtype, **{"out" if log else "grad_input": dx})
            else:
                dx.copy_(own(dout, out, -1, x.dtype))
            if scale != 1:
                dx.mul_(scale)


def _plain(q, k, v, mask, left, right, lower_right) -> bool | None:
    """is_causal of PyTorch's kernel; None where it cannot do the call, or would let through what
    the band or the mask hides."""
    if left >= 0 or right > 0 or q.shape[3] != v.shape[3] or not (q.numel() and k.numel()):
        return None
    if k.shape[2] == 1:  # the gradients of its logits are 0 but for what rounding leaves
        return None
    causal = right == 0
    if causal and lower_right and q.shape[2] != k.shape[2]:
        return None
    if not causal and mask is None:
        return False
    if mask is not None and mask.dtype is not torch.bool and not (mask < torch.inf).all():
        return None
    return causal if all(bool(t.isfinite().all()) for t in (q, k, v)) else None


def _additive(mask: Tensor | None, q: Tensor, T: int) -> Tensor | None:
    """A mask as PyTorch's kernel reads it: floating, one number a key."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    mask = mask if mask.dtype is q.dtype else mask.to(torch.float32)
    if mask.shape[-1] != T or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], T).contiguous()
    return mask


def _empty(mask: Tensor, S: int, causal: bool) -> Tensor:
    """bool [B|1, H|1, S|1, 1]: the rows without a visible key."""
    seen = mask if mask.dtype is torch.bool else mask != -torch.inf
    some = seen.any(-1, keepdim=True)
    if causal:
        first = seen.to(torch.uint8).argmax(-1, keepdim=True)
        some = some & (first <= torch.arange(S, device=mask.device)[:, None])
    return ~some


def _grouped(q, t):
    """Keys or values, one head for each of q's."""
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _operands(q, k, v):
    """As PyTorch's kernel, which looks at no stride of a last dimension, must get them."""
    return tuple(
        t if t.stride(3) == 1 else t.contiguous() for t in (q, _grouped(q, k), _grouped(q, v))
    )


def attention_fwd(out, lse, q, k, v, mask, *rest):
    scale, (left, right, lower_right) = rest[7], rest[10:13]
    with plain(q):
        causal = _plain(q, k, v, mask, left, right, lower_right)
        if causal is None:
            return reference.attention_fwd(out, lse, q, k, v, mask, *rest)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_operands(q, k, v), 0.0, causal, attn_mask=_additive(mask, q, k.shape[2]), scale=scale
        )
        out.copy_(found[0])
        lse.copy_(found[1])
        if mask is not None:
            empty = _empty(mask, q.shape[2], causal)
            out.masked_fill_(empty, 0)
            lse.masked_fill_(empty[..., 0], -torch.inf)


def attention_bwd(dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, mask, *rest):
    scale, (left, right, lower_right), need = rest[7], rest[10:13], rest[-1]
    with plain(q):
        causal = _plain(q, k, v, mask, left, right, lower_right)
        hides = causal or mask is not None
        if need & 8:  # of which PyTorch has no gradient: from an out that was rounded once
            causal, out, lse = None, torch.empty_like(out), torch.empty_like(lse)
            reference.attention_fwd(out, lse, q, k, v, mask, *rest[:-1])
        # Of a row of finite minima lse has lost the digits that its probabilities need.
        far = mask is not None and bool(((lse < -65536) & lse.isfinite()).any())
        if causal is None or far or (hides and not dout.isfinite().all()):
            return reference.attention_bwd(
                dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, mask, *rest
            )
        if mask is not None:  # PyTorch's own of a row without a key, where all is 0
            lse = lse.masked_fill(lse == -torch.inf, 0)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout if dout.stride(3) == 1 else dout.contiguous(), *_operands(q, k, v), out, lse, 0.0,
            causal, attn_mask=_additive(mask, q, k.shape[2]), scale=scale,
        )  # fmt: skip
        for bit, (grad, new) in enumerate(zip((dq, dk, dv), found, strict=True)):
            if need >> bit & 1:
                if new.shape != grad.shape:
                    B, G, T, D = grad.shape
                    new = new.view(B, G, -1, T, D).sum(2, dtype=torch.float32)
                grad.copy_(new)


def _in_use(q, T, lengths, start, left, right) -> Tensor:
    """bool [B, 1, S, T]: the keys that each query sees, as transformers makes it for a cache."""
    S = q.shape[2]
    j = torch.arange(T, device=q.device)
    ends = lengths[:, None, None]
    place = ends - S + torch.arange(S, device=q.device)[:, None]
    seen = (j < ends) & (place >= 0)
    if start is not None:
        seen &= j >= start[:, None, None]
    if left >= 0:
        seen &= j >= place - left
    if right >= 0:
        seen &= j <= place + right
    return seen[:, None]


def attention_decode_fwd(
    out, q, k_cache, v_cache, lengths, start, block_table, slopes, positions, table, lut, scale,
    softcap, left, right,
):  # fmt: skip
    with plain(q):
        shortest, T = (int(n) for n in lengths.aminmax()) if lengths.numel() else (0, 0)
        if 0 < T <= k_cache.shape[2] and shortest >= 0 and out.numel():
            whole = q.shape[2] == 1 and shortest == T and start is None and left < 0
            seen = None if whole else _in_use(q, T, lengths, start, left, right)
            found = torch.nn.functional.scaled_dot_product_attention(
                q, k_cache[:, :, :T], v_cache[:, :, :T], seen, scale=scale,
                enable_gqa=q.shape[1] != k_cache.shape[1],
            )  # fmt: skip
            out.copy_(found)
            if seen is not None:
                out.masked_fill_(~seen.any(-1, keepdim=True), 0)
            if out.isfinite().all():
                return
        # NaN of a key that is not in use would reach all of PyTorch's.
        decode_reference.attention_decode_fwd(
            out, q, k_cache, v_cache, lengths, start, block_table, slopes, positions, table, lut,
            scale, softcap, left, right,
        )  # fmt: skip


def _inside(ids: Tensor, rows: int) -> bool:
    """Whether all of them are in [0, rows), of which PyTorch's kernels are sure."""
    if not ids.numel():
        return True
    low, high = ids.aminmax()
    return bool(low >= 0) and bool(high < rows)


def attention_map_fwd(
    out, q, k, lse, heads, rows, mask, slopes, positions, table, lut, scale, softcap, left, right,
    lower_right, bias_shift, pool,
):  # fmt: skip
    with plain(q):
        (_, H, S, _), T = q.shape, k.shape[2]
        known = all(n is None or _inside(n, size) for n, size in ((heads, H), (rows, S)))
        if not (known and q.numel() and k.numel()):
            return map_reference.attention_map_fwd(
                out, q, k, lse, heads, rows, mask, slopes, positions, table, lut, scale, softcap,
                left, right, lower_right, bias_shift, pool,
            )  # fmt: skip
        seen, k = reference.visible_band(S, T, left, right, lower_right, q.device), _grouped(q, k)
        if heads is not None:
            q, k, lse = q[:, heads], k[:, heads], lse[:, heads]
        if rows is not None:
            q, lse, seen = q[:, :, rows], lse[:, :, rows], None if seen is None else seen[rows]
        # Logits rounded to 16 bits would not be those that lse was taken of.
        p = q.to(torch.float32) @ k.to(torch.float32).transpose(2, 3)
        p = p.mul_(scale).sub_(lse[..., None]).exp_()
        if seen is not None:
            p.masked_fill_(~seen, 0)
        out.copy_(torch.nn.functional.adaptive_avg_pool2d(p, pool) if pool else p)


def sample_fwd(ids, logits, seed, factor, top_k, top_p, greedy):
    with plain(logits):
        torch.argmax(logits, -1, out=ids)
        found = logits.gather(-1, ids[:, None])[:, 0]  # NaN counts as the largest
        ids.masked_fill_(found.isnan() | (found == -torch.inf), -1)


def _float(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(torch.float32)


def _weight(t: Tensor | None, z: Tensor) -> Tensor | None:
    """A norm's weight in float32: PyTorch's kernel keeps statistics in the weight's dtype."""
    if t is None and z.dtype is not torch.float32:
        return z.new_ones(z.shape[-1:], dtype=torch.float32)
    return _float(t)


def _sum(x, residual, x_bias) -> Tensor:
    """residual + x + x_bias in the dtype to which x and residual promote."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    z = x if x_bias is None else x + x_bias
    return (z if residual is None else residual + z).to(dtype)


def _norm_fwd(out, stats, z, weight, bias, eps, rms):
    if rms:
        y, *found = torch.ops.aten._fused_rms_norm(z, z.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    else:
        y, *found = torch.ops.aten.native_layer_norm(
            z, z.shape[-1:], _weight(weight, z), _float(bias), eps
        )
    out.copy_(y)
    for row, values in zip(stats, found, strict=True):
        row.copy_(values.flatten())


def _over_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]).sum(0, dtype=torch.float32)


def _norm_bwd(dweight, dbias, dout, z, stats, weight, needs) -> Tensor | None:
    """The gradient of layer_norm's z, and into their places its parameters', in float32: PyTorch's
    kernel would sum these over the rows in z's dtype. needs: which of the three."""
    shape = z.shape[-1:]
    mean, rstd = (row.view(*z.shape[:-1], 1) for row in stats)
    if needs[1]:
        dweight.copy_(_over_rows((z - mean) * rstd * dout))
    if needs[2]:
        dbias.copy_(_over_rows(dout))
    if not needs[0]:
        return None
    only = (True, False, False)
    return torch.ops.aten.native_layer_norm_backward(
        dout.to(z.dtype), z, shape, mean, rstd, _weight(weight, z), None, only
    )[0]


def add_norm_fwd(
    out, total, stats, x, residual, weight, bias, x_bias, seed, eps, dropout_p, rms, prenorm, wide
):
    if x.shape[-1] == 1:  # what rounding leaves of z - mean would be multiplied by 1 / sqrt(eps)
        return norm_reference.add_norm_fwd(
            out, total, stats, x, residual, weight, bias, x_bias, seed, eps, dropout_p, rms,
            prenorm, wide,
        )  # fmt: skip
    with plain(x):
        z = _sum(x, residual, x_bias)
        _norm_fwd(out, stats, z, weight, bias, eps, rms)
        if prenorm:
            total.copy_(z)


def add_norm_bwd(
    dx, dresidual, dweight, dbias, dx_bias, x, stats, dout, dtotal,
    residual, weight, bias, x_bias, seed, dropout_p, rms, need,
):  # fmt: skip
    # PyTorch has no kernel for the backward of rms_norm.
    if rms or dout is None or not x.numel() or x.shape[-1] == 1:
        return norm_reference.add_norm_bwd(
            dx, dresidual, dweight, dbias, dx_bias, x, stats, dout, dtotal,
            residual, weight, bias, x_bias, seed, dropout_p, rms, need,
        )  # fmt: skip
    with plain(x):
        z = _sum(x, residual, x_bias)
        dz = _norm_bwd(dweight, dbias, dout, z, stats, weight, (need & 19, need & 4, need & 8))
        if dtotal is not None and need & 19:
            dz = dz + dtotal
        if need & 1:
            dx.copy_(dz)
        if need & 2:
            dresidual.copy_(dz)
        if need & 16:
            dx_bias.copy_(_over_rows(dz))


def _known(ids, start, token, position, segment) -> bool:
    input_ids, segment_ids, position_ids = ids
    if position is not None and position_ids is None:
        last = position.shape[0] - input_ids.shape[1]
        if not 0 <= start <= last:
            return False
    tables = ((input_ids, token), (segment_ids, segment), (position_ids, position))
    return all(ids is None or _inside(ids, table.shape[0]) for ids, table in tables)


def _rows(table: Tensor, ids: Tensor | None, these: slice) -> Tensor:
    return table[these] if ids is None else torch.nn.functional.embedding(ids, table)


def _embedded(token, position, segment, input_ids, segment_ids, position_ids, start, scale):
    """The sum of the rows, rounded to their dtype after each step."""
    z = _rows(token, input_ids, slice(0))
    z = z if scale == 1 else z * scale
    if position is not None:
        z = z + _rows(position, position_ids, slice(start, start + z.shape[1]))
    return z if segment is None else z + _rows(segment, segment_ids, slice(1))


def embed_fwd(
    out, stats, token, position, segment, norm_weight, norm_bias, input_ids, segment_ids,
    position_ids, seed, start, padding_idx, position_padding, norm, scale, eps, dropout_p, wide,
):  # fmt: skip
    ids = (input_ids, segment_ids, position_ids)
    with plain(token):
        if not _known(ids, start, token, position, segment) or token.shape[1] == 1:
            return embed_reference.embed_fwd(
                out, stats, token, position, segment, norm_weight, norm_bias, *ids, seed, start,
                padding_idx, position_padding, norm, scale, eps, dropout_p, wide,
            )  # fmt: skip
        z = _embedded(token, position, segment, *ids, start, scale)
        if norm:
            _norm_fwd(out, stats, z, norm_weight, norm_bias, eps, norm == 2)
        else:
            out.copy_(z)


def embed_bwd(
    dtoken, dposition, dsegment, dnorm_weight, dnorm_bias, token, position, segment, norm_weight,
    norm_bias, stats, dout, input_ids, segment_ids, position_ids, seed, start, padding_idx,
    position_padding, norm, scale, dropout_p, need,
):  # fmt: skip
    ids, tables = (input_ids, segment_ids, position_ids), (token, position, segment)
    with plain(token):
        # Of one column, and of rms_norm's backward, see add_norm.
        if norm == 2 or not dout.numel() or dout.shape[2] == 1 or not _known(ids, start, *tables):
            return embed_reference.embed_bwd(
                dtoken, dposition, dsegment, dnorm_weight, dnorm_bias, *tables, norm_weight,
                norm_bias, stats, dout, *ids, seed, start, padding_idx, position_padding, norm,
                scale, dropout_p, need,
            )  # fmt: skip
        dz = dout
        if norm:
            z = _embedded(*tables, *ids, start, scale)
            needs = (need & 7, need & 8, need & 16)
            dz = _norm_bwd(dnorm_weight, dnorm_bias, dout, z, stats, norm_weight, needs)
        if not need & 7:
            return
        # PyTorch would sum the rows of a 16-bit table in 16 bits.
        dz = dz.to(torch.float32)
        if need & 1:
            dtoken.copy_(_summed(dz if scale == 1 else dz * scale, input_ids, token, padding_idx))
        if need & 2 and position_ids is not None:
            dposition.copy_(_summed(dz, position_ids, position, position_padding))
        elif need & 2:
            dposition.zero_()[start : start + dz.shape[1]] = dz.sum(0)
        if need & 4 and segment_ids is not None:
            dsegment.copy_(_summed(dz, segment_ids, segment, -1))
        elif need & 4:
            dsegment.zero_()[0] = dz.sum((0, 1))


def _summed(dz: Tensor, ids: Tensor, table: Tensor, padding: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(dz, ids, table.shape[0], padding, False)
