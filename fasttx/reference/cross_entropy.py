"""Cross-entropy in plain PyTorch, in O(rows x classes) memory.

`cross_entropy_math` is differentiable to any order; the others are the backend, with the calling
convention of fasttx/ops/cross_entropy.py. Statistics in fp32, in fp64 for fp64 logits.
"""

import torch
from torch import Tensor


def targets(target: Tensor, V: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows used, those whose target is out of range, a safe target."""
    used = target != ignore_index
    bad = used & ((target < 0) | (target >= V))
    return used, bad, torch.where(used & ~bad, target, 0)


def _rows(logits: Tensor, target: Tensor, ignore_index: int, wide: torch.dtype):
    """x [M, V] with ignored rows 0, and `targets`."""
    V = logits.shape[-1]
    used, bad, safe = targets(target, V, ignore_index)
    x = torch.where(used[:, None], logits.reshape(-1, V).to(wide), 0)
    return x, used, bad, safe


def normalisation(
    target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, wide: torch.dtype
) -> Tensor:
    """[2]: what the cross-entropy and the z-loss are multiplied by."""
    if reduction != 1:
        return torch.ones(2, dtype=wide, device=target.device)
    used = target != ignore_index
    count = used.sum().to(wide)
    if weight is None:
        total = count
    else:
        V = weight.numel()
        inside = used & (target >= 0) & (target < V)
        total = torch.where(inside, weight[torch.where(inside, target, 0)], 0).to(wide).sum()
    return torch.stack((total.reciprocal(), count.reciprocal()))


def cross_entropy_math(
    logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, compute=None
):
    """(loss, peak, log_sum, norm), loss differentiable in logits. compute: the dtype of every step,
    fp32 where None (fp64 for fp64)."""
    wide = compute or torch.promote_types(logits.dtype, torch.float32)
    x, used, bad, safe = _rows(logits, target, ignore_index, wide)
    peak = x.detach().amax(-1)
    logs = torch.log_softmax(x, -1)
    weights = x.new_ones(x.shape[-1]) if weight is None else weight.to(wide)
    ce = -(1 - label_smoothing) * weights[safe] * logs.gather(1, safe[:, None])[:, 0]
    if label_smoothing:
        ce = ce - label_smoothing / x.shape[-1] * (logs * weights).sum(-1)
    log_sum = (x - peak[:, None]).exp().sum(-1).log()
    norm = normalisation(target, weight, ignore_index, reduction, wide)
    loss = ce * norm[0]
    if z_loss:
        loss = loss + z_loss * (peak + log_sum).square() * norm[1]
    return total(loss, used, bad, reduction), peak, log_sum.detach(), norm


def total(rows: Tensor, used: Tensor, bad: Tensor, reduction: int) -> Tensor:
    """The loss from its rows, each multiplied by its share already."""
    rows = torch.where(used, rows * torch.where(bad, torch.nan, 1.0), 0)
    if reduction == 1:
        return torch.where(used.any(), rows.sum(), torch.nan)
    return rows.sum() if reduction else rows


def cross_entropy_fwd(loss, peak, log_sum, norm, logits, *args):
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        found = cross_entropy_math(logits, *args)
        for result, value in zip((loss, peak, log_sum, norm), found, strict=True):
            result.copy_(value)


def _gradient(dloss, logits, target, weight, peak, log_sum, norm, ignore_index, reduction,
              label_smoothing, z_loss):  # fmt: skip
    wide = torch.promote_types(logits.dtype, torch.float32)
    x, used, bad, safe = _rows(logits, target, ignore_index, wide)
    V = x.shape[-1]
    weights = x.new_ones(V) if weight is None else weight.to(wide)
    up, up_z = (dloss.to(wide) * n for n in norm.to(wide))
    peak, log_sum = peak.to(wide), log_sum.to(wide)
    p = torch.softmax(x, -1)
    keep, share = (1 - label_smoothing) * weights[safe], label_smoothing / V
    rise = up * (keep + share * weights.sum()) + 2 * z_loss * (peak + log_sum) * up_z
    dx = rise[:, None] * p
    if label_smoothing:
        dx -= (up * share).expand(used.shape)[:, None] * weights
    dx.scatter_add_(1, safe[:, None], -(up * keep)[:, None])
    return dx.masked_fill_(bad[:, None], torch.nan).masked_fill_(~used[:, None], 0)


def cross_entropy_bwd(dlogits, dloss, logits, *args):
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        dlogits.copy_(_gradient(dloss, logits, *args).view_as(dlogits))


def cross_entropy_inplace(loss, factor, logits, target, weight, *scalars):
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        found, peak, log_sum, norm = cross_entropy_math(logits, target, weight, *scalars)
        loss.copy_(found)
        later = logits.dtype is torch.float16
        factor.copy_(norm[0]) if later else factor.fill_(1)
        norm = norm / norm[0] if later else norm
        unit = torch.ones_like(loss)
        dx = _gradient(unit, logits, target, weight, peak, log_sum, norm, *scalars)
        logits.copy_(dx.view_as(logits))


def cross_entropy_rescale(grad, dloss, factor, target, ignore_index):
    by = (dloss * factor).expand(target.shape).masked_fill(target == ignore_index, 1)
    if not (by == 1).all():
        grad.mul_(by.view(grad.shape[:2])[..., None])
