"""Sampling after temperature, top-k and top-p in plain PyTorch: the formulas of
fasttx/ops/sample.py, whose integers every backend shares."""

import torch
from torch import Tensor

from .philox import philox

# 2^-y on [0, 1) as C0 - y (C1 - y (C2 - ...)), times 2^31: a minimax fit, relative error 7.5e-8.
COEFFICIENTS = (2147483487, 1488511653, 515765849, 118712301, 19732394, 2016033)
LIMIT = 40 * 2**24
_FRACTION = 2**24 - 1


def _mass(x: Tensor, peak: Tensor, factor: float) -> Tensor:
    """int64 weights of logits x."""
    scale = torch.tensor(factor, dtype=torch.float32, device=x.device).to(x.dtype)
    y = ((peak - x) * scale).clamp(max=LIMIT)
    d = torch.where(x == peak, 0, y.nan_to_num(0)).to(torch.int64)
    f, h = d & _FRACTION, COEFFICIENTS[-1]
    for c in reversed(COEFFICIENTS[:-1]):
        h = c - (h * f >> 24)
    return (h << 7) >> (d >> 24)


def sample_math(logits, seed, factor, top_k, top_p, greedy) -> Tensor:
    """ids [R]; the arguments of sample_fwd."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = x.amax(-1, keepdim=True)
    bad = x.isnan().any(-1) | (peak[:, 0] == -torch.inf)
    if greedy:
        return (x == peak).to(torch.uint8).argmax(-1).masked_fill(bad, -1)
    w = _mass(x, peak, factor)
    if top_k:
        w = w.masked_fill(x < x.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        total = w.sum(-1, keepdim=True)
        p = torch.tensor(top_p, dtype=torch.float32, device=x.device).double()
        target = (p * total.double()).to(torch.int64).clamp(min=1).minimum(total)
        ordered, order = x.sort(-1, descending=True)
        weights = w.gather(-1, order)
        before = weights.cumsum(-1) - weights
        last = (before < target).sum(-1, keepdim=True) - 1
        w = w.masked_fill(x < ordered.gather(-1, last.clamp(min=0)), 0)
    rows = torch.arange(len(x), device=x.device)
    none = torch.zeros((), dtype=torch.int64, device=x.device)
    words = philox((none, rows, none, none), int(seed.item()))
    u = (words[0] << 21 | words[1] >> 11).double() * 2.0**-53
    total = w.sum(-1)
    r = (u * total.double()).to(torch.int64).minimum(total - 1)
    ids = (w.cumsum(-1) <= r[:, None]).sum(-1)
    return ids.masked_fill(bad, -1)


def sample_fwd(ids, logits, *args):
    with torch.no_grad():
        ids.copy_(sample_math(logits, *args))
