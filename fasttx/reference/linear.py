"""act(x W^T + bias) + residual in plain PyTorch.

`linear_math` is differentiable to any order; `linear_fwd` and `linear_bwd` are the backend, with
the calling convention of fasttx/ops/linear.py. Everything in fp32, in fp64 for fp64 inputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(pre: Tensor, activation: int) -> Tensor:
    """The activation by its code in fasttx/ops/linear.py."""
    match activation:
        case 0:
            return pre
        case 1:
            return F.gelu(pre)
        case 2:
            return F.gelu(pre, approximate="tanh")
        case 3:
            return F.relu(pre)
        case 4:
            return F.silu(pre)
    raise ValueError(f"activation must be 0 to 4, got {activation}")


def slope(pre: Tensor, activation: int) -> Tensor:
    """The derivative of the activation."""
    match activation:
        case 0:
            return torch.ones_like(pre)
        case 1:
            density = torch.exp(-0.5 * pre * pre) / math.sqrt(2 * math.pi)
            return 0.5 * torch.erfc(-pre / math.sqrt(2)) + pre * density
        case 2:
            c = math.sqrt(2 / math.pi)
            t = torch.tanh(c * (pre + 0.044715 * pre**3))
            return 0.5 * (1 + t) + 0.5 * pre * (1 - t * t) * c * (1 + 3 * 0.044715 * pre * pre)
        case 3:
            return (pre > 0).to(pre.dtype)
        case 4:
            s = torch.sigmoid(pre)
            return s * (1 + pre * (1 - s))
    raise ValueError(f"activation must be 0 to 4, got {activation}")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias in a's dtype."""
    c = a @ b.to(a.dtype).mT
    return c if bias is None else c + bias.to(a.dtype)


def linear_math(x, weight, bias, residual, activation, keep, compute=None):
    """(out, pre), differentiable; the arguments of linear_fwd, x of any number of dimensions.
    compute: the dtype of every step, fp32 where None (fp64 for fp64)."""
    dtype = compute or torch.promote_types(x.dtype, torch.float32)
    pre = product(x.to(dtype), weight, bias)
    out = activate(pre, activation)
    if residual is not None:
        out = out + residual.to(dtype)
    return out, pre if keep else pre.new_empty(0)


def linear_fwd(out, pre, x, *args):
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        for result, value in zip((out, pre), linear_math(x, *args), strict=True):
            result.copy_(value)


def linear_bwd(dx, dweight, dbias, x, weight, pre, dout, activation, need):
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        dpre = dout.to(wide)
        if activation:
            dpre = dpre * slope(pre.to(wide), activation)
        if need & 1:
            dx.copy_(dpre @ weight.to(wide))
        if need & 2:
            dweight.copy_(dpre.mT @ x.to(wide))
        if need & 4:
            dbias.copy_(dpre.sum(0))
