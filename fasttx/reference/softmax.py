"""softmax(scale * x + mask) and its logarithm in plain PyTorch.

`softmax_math` is differentiable to any order; `softmax_fwd` and `softmax_bwd` are the backend, with
the calling convention of fasttx/ops/softmax.py. Statistics in fp32, in fp64 for fp64 inputs.
"""

import torch

from .attention import visible_band


def softmax_math(x, mask, scale, causal, lower_right, log, wide, compute=None):
    """The result, differentiable; the arguments of softmax_fwd. compute: the dtype of every step,
    fp32 where None (fp64 for fp64)."""
    dtype = compute or torch.promote_types(x.dtype, torch.float32)
    logits = scale * x.to(dtype)
    visible = torch.ones((), dtype=torch.bool, device=x.device)
    if causal:
        visible = visible_band(x.shape[-2], x.shape[-1], -1, 0, lower_right, x.device)
    if mask is not None and mask.dtype is torch.bool:
        visible = visible & mask
    elif mask is not None:
        hidden = mask == -torch.inf
        visible = visible & ~hidden
        # A hidden entry's -inf must not meet the gradient of the sum.
        logits = logits + mask.masked_fill(hidden, 0).to(dtype)
    visible = visible & (logits != -torch.inf)
    some = visible.any(-1, keepdim=True)
    logits = logits.masked_fill(~visible, -torch.inf).masked_fill(~some, 0)
    if log:
        return torch.where(visible, torch.log_softmax(logits, -1), -torch.inf)
    return torch.where(visible, torch.softmax(logits, -1), 0)


def softmax_fwd(out, x, *args):
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        out.copy_(softmax_math(x, *args))


def softmax_bwd(dx, dmask, dout, out, x, mask, scale, causal, lower_right, log, need):
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        y = out.to(wide)
        visible = y != (-torch.inf if log else 0)
        dy = dout.to(wide).masked_fill(~visible, 0)
        if log:
            d = dy - y.exp() * dy.sum(-1, keepdim=True)
        else:
            d = y * (dy - (dy * y).sum(-1, keepdim=True))
        d = d.masked_fill(~visible, 0)
        if need & 1:
            dx.copy_(scale * d)
        if need & 2:
            dmask.copy_(d.sum_to_size(mask.shape))
