"""linear_cross_entropy on the CPU by blocks of classes: csrc/cpu/linear_cross_entropy_classes.cpp.

A first walk over the classes finds each row's statistics, a second one the gradients: dweight and
dbias of a block of classes are whole, dx is summed in float32. The logits of as many rows as x has
columns wait in dweight's own memory, until a block's gradients overwrite them; those of the rows
beyond are computed twice. Where no dweight is asked for, rows go in chunks whose logits fit the
budget.
"""

import torch
from torch import Tensor

from .. import native

ROWS = 32  # of fewer, lanes of vectors would be empty


def fits(walk) -> bool:
    return (
        walk.backend == "cpu" and walk.n >= ROWS and walk.need & 6 != 4 and not native.unavailable()
    )


def run(walk, dloss: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor) -> Tensor:
    """The gradients asked for; the loss of each row."""
    n, V, need = walk.n, walk.weight.shape[0], walk.need
    step = max(1, walk.rows) if need == 1 else n
    kept = dweight if need & 2 else walk.x.new_empty(V, step if need else 0)
    walk.peak, walk.log_sum, at_target, weighted = (
        walk.x.new_zeros(n, dtype=torch.float32) for _ in range(4)
    )
    picked = need & 1 and walk.kept is not None
    gradient = torch.empty_like(walk.x) if picked else dx
    kernels = torch.ops.fasttx_native
    for begin in range(0, n, step):
        rows = slice(begin, min(n, begin + step))
        given = (
            walk.x[rows], walk.weight, walk.bias, walk.target[rows], walk.class_weight,
            kept[:, : min(rows.stop - begin, kept.shape[1])],
            walk.peak[rows], walk.log_sum[rows], at_target[rows],
        )  # fmt: skip
        kernels.linear_cross_entropy_statistics_cpu(
            *given, weighted[rows] if walk.smoothing else None
        )
        if need:
            kernels.linear_cross_entropy_gradients_cpu(
                *given, walk.scales(rows, dloss), gradient[rows] if need & 1 else dx,
                dweight, dbias, need,
            )  # fmt: skip
    if picked:
        dx.zero_()
        dx[walk.kept] = gradient
    return _losses(walk, at_target, weighted)


def _losses(walk, at_target: Tensor, weighted: Tensor) -> Tensor:
    peak = walk.peak.double()
    losses = (1 - walk.smoothing) * walk.row_weight * (peak - at_target + walk.log_sum)
    if walk.smoothing:
        share = walk.smoothing / walk.weight.shape[0]
        losses = losses + share * (walk.weight_sum * (peak + walk.log_sum) - weighted)
    return losses.masked_fill(walk.used & ~walk.inside, torch.nan)
