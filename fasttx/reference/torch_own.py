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
from . import softmax as softmax_reference
from .unfused import plain


def softmax_fwd(out, x, mask, scale, causal, lower_right, log, wide):
    with plain(x):
        z = x if scale == 1 else x * scale
        if z.data_ptr() == out.data_ptr():
            z = x.clone()
        own = torch.ops.aten._log_softmax if log else torch.ops.aten._softmax
        own.out(z, -1, False, out=out)
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
            if log:
                torch.ops.aten._log_softmax_backward_data.out(dout, out, -1, x.dtype, out=dx)
            else:
                torch.ops.aten._softmax_backward_data.out(dout, out, -1, x.dtype, grad_input=dx)
            if scale != 1:
                dx.mul_(scale)


def _plain(q, k, v, left, right, lower_right) -> bool | None:
    """is_causal of PyTorch's kernel; None where it cannot do the call, or would let through what
    the band hides."""
    if left >= 0 or right > 0 or q.shape[3] != v.shape[3] or not (q.numel() and k.numel()):
        return None
    if right < 0:
        return False
    if lower_right and q.shape[2] != k.shape[2]:
        return None
    return True if all(bool(t.isfinite().all()) for t in (q, k, v)) else None


def _grouped(q, t):
    """Keys or values, one head for each of q's."""
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def attention_fwd(out, lse, q, k, v, *rest):
    scale, (left, right, lower_right) = rest[8], rest[11:14]
    with plain(q):
        causal = _plain(q, k, v, left, right, lower_right)
        if causal is None:
            return reference.attention_fwd(out, lse, q, k, v, *rest)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, _grouped(q, k), _grouped(q, v), 0.0, causal, scale=scale
        )
        out.copy_(found[0])
        lse.copy_(found[1])


def attention_bwd(dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, *rest):
    scale, (left, right, lower_right), need = rest[8], rest[11:14], rest[-1]
    with plain(q):
        causal = _plain(q, k, v, left, right, lower_right)
        if causal is None or (causal and not dout.isfinite().all()):
            return reference.attention_bwd(
                dq, dk, dv, dmask, dtable, dout, dlse, q, k, v, out, lse, *rest
            )
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, _grouped(q, k), _grouped(q, v), out, lse, 0.0, causal, scale=scale
        )
        for bit, (grad, new) in enumerate(zip((dq, dk, dv), found, strict=True)):
            if need >> bit & 1:
                if new.shape != grad.shape:
                    B, G, T, D = grad.shape
                    new = new.view(B, G, -1, T, D).sum(2, dtype=torch.float32)
                grad.copy_(new)


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


def _norm_bwd(dweight, dbias, dout, z, stats, weight, needs) -> Tensor | None:
    """The gradient of layer_norm's z, and into their places its parameters', in float32: PyTorch's
    kernel would sum these over the rows in z's dtype. needs: which of the three."""
    shape = z.shape[-1:]
    mean, rstd = (row.view(*z.shape[:-1], 1) for row in stats)
    if needs[1]:
        torch.sum(((z - mean) * rstd * dout).reshape(-1, *shape), 0, out=dweight)
    if needs[2]:
        torch.sum(dout.reshape(-1, *shape), 0, out=dbias)
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
            dx_bias.copy_(dz.reshape(-1, dz.shape[-1]).sum(0, dtype=torch.float32))
