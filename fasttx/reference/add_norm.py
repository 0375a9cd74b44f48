"""norm(residual + dropout(x + x_bias)) in plain PyTorch.

`add_norm_math` is differentiable to any order; `add_norm_fwd` and `add_norm_bwd` are the backend,
with the calling convention of fasttx/ops/add_norm.py. Statistics in fp32, in fp64 for fp64 inputs.
"""

import torch
from torch import Tensor

from .philox import dropout_threshold, philox_mask


def kept(x: Tensor, seed: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """bool of x's shape, True where dropout keeps, and what kept values are multiplied by."""
    columns = x.shape[-1]
    rows = x[..., :1].numel() if columns else 0
    mask = philox_mask(seed, dropout_p, 1, 1, rows, columns).view(x.shape)
    return mask, 65536 / (65536 - dropout_threshold(dropout_p))


def _sum(x, residual, x_bias, seed, dropout_p, wide: torch.dtype) -> Tensor:
    z = x.to(wide)
    if x_bias is not None:
        z = z + x_bias.to(wide)
    if dropout_threshold(dropout_p):
        keep, scale = kept(x, seed, dropout_p)
        z = torch.where(keep, z * scale, 0)
    return z if residual is None else residual.to(wide) + z


def add_norm_math(
    x, residual, weight, bias, x_bias, seed, eps, dropout_p, rms, prenorm, wide, compute=None
):
    """(out, total, stats), differentiable; the arguments of add_norm_fwd. compute: the dtype of
    every step, fp32 where None (fp64 for fp64)."""
    dtype = compute or torch.promote_types(x.dtype, torch.float32)
    total = _sum(x, residual, x_bias, seed, dropout_p, dtype)
    centered, stats = total, []
    if not rms:
        mean = total.mean(-1, keepdim=True)
        centered, stats = total - mean, [mean]
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    out = centered * rstd
    if weight is not None:
        out = out * weight.to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    stats = torch.stack([s.flatten() for s in (*stats, rstd)])
    return out, total if prenorm else total.new_empty(0), stats


def add_norm_fwd(out, total, stats, x, *args):
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        for result, value in zip((out, total, stats), add_norm_math(x, *args), strict=True):
            result.copy_(value)


def add_norm_bwd(
    dx, dresidual, dweight, dbias, dx_bias, x, stats, dout, dtotal,
    residual, weight, bias, x_bias, seed, dropout_p, rms, need,
):  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        xhat = _sum(x, residual, x_bias, seed, dropout_p, wide)
        rows = (*x.shape[:-1], 1)
        if not rms:
            xhat = xhat - stats[0].view(rows)
        rstd = stats[-1].view(rows)
        xhat = xhat * rstd
        g = torch.zeros_like(xhat) if dout is None else dout.to(wide)
        gw = g if weight is None else g * weight.to(wide)
        dz = gw - xhat * (gw * xhat).mean(-1, keepdim=True)
        if not rms:
            dz = dz - gw.mean(-1, keepdim=True)
        dz = dz * rstd
        if dtotal is not None:
            dz = dz + dtotal.to(wide)
        d = dz
        if dropout_threshold(dropout_p):
            keep, scale = kept(x, seed, dropout_p)
            d = torch.where(keep, dz * scale, 0)
        columns = (-1, x.shape[-1]) if x.shape[-1] else (0, 0)
        grads = (
            lambda: d,
            lambda: dz,
            lambda: (g * xhat).reshape(columns).sum(0),
            lambda: g.reshape(columns).sum(0),
            lambda: d.reshape(columns).sum(0),
        )
        for bit, result in enumerate((dx, dresidual, dweight, dbias, dx_bias)):
            if need >> bit & 1:
                result.copy_(grads[bit]())
