"""linear followed by cross-entropy, in plain PyTorch and O(rows x classes) memory.

`linear_cross_entropy_math` is differentiable to any order; the others are the backend, with the
calling convention of fasttx/ops/linear_cross_entropy.py.
"""

import torch

from .cross_entropy import cross_entropy_math


def headroom(x: torch.Tensor, reduction: int) -> float:
    """What the forward's gradients are multiplied by: fp16 has no room for gradients divided by
    the number of rows."""
    return 1024.0 if x.dtype is torch.float16 and reduction == 1 else 1.0


def linear_cross_entropy_math(x, weight, bias, target, class_weight, *scalars, compute=None):
    """loss, differentiable in x, weight and bias. compute: as in cross_entropy_math."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    used = (target != scalars[0])[:, None]
    x, weight = torch.where(used, x, 0).to(wide), weight.to(wide)
    logits = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(wide))
    return cross_entropy_math(logits, target, class_weight, *scalars, compute=compute)[0]


def linear_cross_entropy_fwd(loss, dx, dweight, dbias, x, *args):
    *args, need = args
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        loss.copy_(linear_cross_entropy_math(x, *args))
    if need:
        unit = loss.new_full((), headroom(x, args[5]))
        linear_cross_entropy_bwd(dx, dweight, dbias, unit, x, *args, need)


def linear_cross_entropy_bwd(dx, dweight, dbias, dloss, x, weight, bias, *args):
    *args, need = args
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        loss = linear_cross_entropy_math(*leaves, *args)
        wanted = [t for i, t in enumerate(leaves) if need >> i & 1]
        found = iter(torch.autograd.grad(loss, wanted, dloss.to(loss.dtype)))
    with torch.no_grad():
        for bit, result in enumerate((dx, dweight, dbias)):
            if need >> bit & 1:
                result.copy_(next(found))
