"""The walk of linear_cross_entropy over chunks of rows and slices of classes.

Rows: logits of a chunk, their statistics and loss, then in their place their gradient, and from it
dx, which is whole, and the chunk's part of dweight and dbias, summed in float32. For 16-bit weights
of several chunks that sum would need memory as large as float32 weights: there the logits of all
rows are computed once more a slice of classes at a time, whose dweight and dbias are whole.
On the CPU `_linear_cross_entropy_classes.py` walks otherwise, without that fourth product.
"""

import torch
from torch import Tensor

from .. import native
from ..reference.linear_cross_entropy import headroom
from . import _linear_cross_entropy_classes as by_classes
from .cross_entropy import cross_entropy_fwd


def _budget(rows: int, V: int) -> int:
    """Bytes a block of logits may take: less than an eighth of the float32 logits."""
    return max(rows * V * 4 // 10, 4 << 20)


def _even(total: int, most: int) -> int:
    """The size of equal parts of at most `most`."""
    parts = -(-total // max(1, most))
    return -(-total // max(1, parts))


def _add_columns(sums: Tensor, x: Tensor) -> None:
    """sums += x.sum(0) in float32; torch copies what it sums in another dtype, so by parts."""
    step = max(1, (1 << 18) // max(1, x.shape[0]))
    for begin in range(0, x.shape[1], step):
        sums[begin : begin + step] += x[:, begin : begin + step].sum(0, dtype=torch.float32)


class _Walk:
    def __init__(self, backend, x, weight, bias, target, class_weight, scalars, need):
        self.backend, self.weight, self.bias, self.need = backend, weight, bias, need
        self.class_weight = class_weight
        self.ignore_index, self.reduction, self.smoothing, self.z_loss = scalars
        V = weight.shape[0]
        self.budget = _budget(x.shape[0], V) // x.element_size()
        used = target != self.ignore_index
        self.kept = None
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            kept = used.nonzero()[:, 0]
            self.kept = kept if kept.numel() < x.shape[0] else None
        self.x = x if self.kept is None else x[self.kept]
        self.target = target if self.kept is None else target[self.kept]
        self.used = used if self.kept is None else used[self.kept]
        self.norm = self._norm()
        self.rows = _even(self.x.shape[0], self.budget // V)
        self.n = self.x.shape[0]
        # Few rows on the CPU: fasttx's products, which write dweight once, past the cache.
        self.few = backend == "cpu" and 0 < self.n <= self.rows and not native.unavailable()

    def _norm(self) -> tuple:
        """What the cross-entropy and the z-loss are multiplied by, and the classes' weights."""
        total = count = self.x.new_ones((), dtype=torch.float32)
        V, weight, t = self.weight.shape[0], self.class_weight, self.target
        self.inside = self.used & (t >= 0) & (t < V)
        safe = torch.where(self.inside, t, 0)
        self.row_weight = self.inside.float() if weight is None else weight[safe] * self.inside
        self.weight_sum = float(V) if weight is None else weight.sum()
        if self.reduction == 1:
            total, count = self.row_weight.double().sum(), self.used.sum()
        return (1 / total.double()).float(), (1 / count.double()).float()

    def scales(self, rows: slice, dloss: Tensor) -> Tensor:
        """[3, R]: rise, fall, hit of rows; 0 for those to ignore, NaN for bad targets."""
        used, lse = self.used[rows], self.peak[rows] + self.log_sum[rows]
        up = dloss if dloss.dim() == 0 or self.kept is None else dloss[self.kept]
        up = up if up.dim() == 0 else up[rows]
        up = up.float().expand(lse.shape).masked_fill(used & ~self.inside[rows], torch.nan)
        ce, z = up * self.norm[0], up * self.norm[1]
        hit = ce * (1 - self.smoothing) * self.row_weight[rows]
        fall = ce * (self.smoothing / self.weight.shape[0])
        rise = hit + fall * self.weight_sum
        if self.z_loss:
            rise = rise + 2 * self.z_loss * lse * z
        return torch.stack((rise, fall, hit)).masked_fill(~used, 0)

    def logits(self, buffer: Tensor, x: Tensor, classes: slice) -> Tensor:
        weight = self.weight[classes]
        out = buffer[: x.shape[0] * weight.shape[0]].view(x.shape[0], weight.shape[0])
        if self.few:
            nothing = x.new_empty(0)
            torch.ops.fasttx_native.linear_fwd_cpu(
                out, nothing, x, weight, self.bias, None, 0, False
            )
            return out
        if self.bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(self.bias[classes], x, weight.t(), out=out)

    def slope(self, logits: Tensor, rows: slice, classes: slice, scales: Tensor) -> None:
        from .linear_cross_entropy import linear_cross_entropy_slope

        linear_cross_entropy_slope(
            logits, self.target[rows], self.class_weight, self.peak[rows], self.log_sum[rows],
            scales, classes.start, backend=self.backend,
        )  # fmt: skip

    def run(self, loss, dloss, dx, dweight, dbias) -> None:
        if by_classes.fits(self):
            losses = by_classes.run(self, dloss, dx, dweight, dbias)
            if loss is not None:
                self._reduce(losses, loss)
            return
        V, n, need = self.weight.shape[0], self.n, self.need
        several = n > self.rows
        narrow = self.x.element_size() == 2
        by_slices = several and narrow and need & 6
        summed = need & 6 and not by_slices
        buffer = self.x.new_empty(min(max(self.rows, 1) * V, n * V))
        self.peak, self.log_sum = (self.x.new_empty(n, dtype=torch.float32) for _ in range(2))
        losses = self.x.new_empty(n, dtype=torch.float32)
        if need & 1 and self.kept is not None:
            dx.zero_()
        if need & 2 and n == 0:
            dweight.zero_()
        every = slice(0, V)
        dbias_sum = None
        if need & 4 and not self.few:
            dbias_sum = self.x.new_zeros(V, dtype=torch.float32)
        for begin in range(0, n, max(1, self.rows)):
            rows = slice(begin, min(n, begin + self.rows))
            x = self.x[rows]
            logits = self.logits(buffer, x, every)
            losses[rows], self.peak[rows], self.log_sum[rows], _ = cross_entropy_fwd(
                logits[None], self.target[rows], self.class_weight, self.ignore_index, 0,
                self.smoothing, 0.0, backend=self.backend,
            )  # fmt: skip
            if not (need & 1 or summed):
                continue
            self.slope(logits, rows, every, self.scales(rows, dloss))
            if self.few:
                self._few_gradients(logits, dx, dweight, dbias)
                continue
            if need & 1 and self.kept is None:
                torch.mm(logits, self.weight, out=dx[rows])
            elif need & 1:
                dx[self.kept[rows]] = torch.mm(logits, self.weight)
            if need & 2 and summed and begin:
                dweight.addmm_(logits.t(), x)
            elif need & 2 and summed:
                torch.mm(logits.t(), x, out=dweight)
            if need & 4 and not by_slices:
                _add_columns(dbias_sum, logits)
        if by_slices:
            self._slices(buffer, dloss, dweight, dbias_sum)
        if dbias_sum is not None:
            dbias.copy_(dbias_sum)
        if loss is not None:
            self._reduce(losses, loss)

    def _few_gradients(self, logits: Tensor, dx, dweight, dbias) -> None:
        picked = self.need & 1 and self.kept is not None
        part = torch.empty_like(self.x) if picked else dx
        torch.ops.fasttx_native.linear_bwd_cpu(
            part, dweight, dbias, self.x, self.weight, None, logits, 0, self.need
        )
        if picked:
            dx[self.kept] = part

    def _slices(self, buffer: Tensor, dloss: Tensor, dweight: Tensor, dbias: Tensor) -> None:
        V = self.weight.shape[0]
        rows = slice(0, self.n)
        scales = self.scales(rows, dloss)
        wide = _even(V, buffer.numel() // self.n)
        for begin in range(0, V, wide):
            classes = slice(begin, min(V, begin + wide))
            logits = self.logits(buffer, self.x, classes)
            self.slope(logits, rows, classes, scales)
            if self.need & 2:
                torch.mm(logits.t(), self.x, out=dweight[classes])
            if self.need & 4:
                _add_columns(dbias[classes], logits)

    def _reduce(self, losses: Tensor, loss: Tensor) -> None:
        lse = (self.peak + self.log_sum).masked_fill(~self.used, 0)
        losses = losses.double() * self.norm[0]
        if self.z_loss:
            losses = losses + self.z_loss * lse.double().square() * self.norm[1]
        losses = losses.masked_fill(~self.used, 0)
        if self.reduction == 0:
            if self.kept is None:
                loss.copy_(losses)
            else:
                loss.zero_()
                loss[self.kept] = losses.to(loss.dtype)
            return
        total = losses.sum()
        if self.reduction == 1:
            total = torch.where(self.used.any(), total, torch.nan)
        loss.copy_(total)


def _forward(backend, loss, dx, dweight, dbias, x, weight, bias, target, class_weight,
             ignore_index, reduction, smoothing, z_loss, need):  # fmt: skip
    scalars = (ignore_index, reduction, smoothing, z_loss)
    walk = _Walk(backend, x, weight, bias, target, class_weight, scalars, need)
    unit = x.new_full((), headroom(x, reduction), dtype=torch.float32)
    walk.run(loss, unit, dx, dweight, dbias)


def _backward(backend, dx, dweight, dbias, dloss, x, weight, bias, target, class_weight,
              ignore_index, reduction, smoothing, z_loss, need):  # fmt: skip
    scalars = (ignore_index, reduction, smoothing, z_loss)
    walk = _Walk(backend, x, weight, bias, target, class_weight, scalars, need)
    walk.run(None, dloss, dx, dweight, dbias)


def fwd_cpu(*args):
    _without_autocast(_forward, "cpu", args)


def fwd_triton(*args):
    _without_autocast(_forward, "triton", args)


def bwd_cpu(*args):
    _without_autocast(_backward, "cpu", args)


def bwd_triton(*args):
    _without_autocast(_backward, "triton", args)


def _without_autocast(function, backend: str, args: tuple) -> None:
    with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
        function(backend, *args)
