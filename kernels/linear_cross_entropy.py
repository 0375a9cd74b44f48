"""linear_cross_entropy in Triton: a block of logits, some rows by some classes, becomes its
gradient in place. The arguments are those of fasttx/ops/linear_cross_entropy.py."""

import triton
import triton.language as tl

from .cross_entropy import Features, _class_weight, _columns, _slope
from .launch import Call


@triton.jit
def _block_slope(logits, stride, target, weight, peaks, log_sums, scales, rows, C, first_class,
                 F: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride[0]
    t = tl.load(target + row) - first_class
    peak = tl.load(peaks + row)
    log_sum = tl.load(log_sums + row)
    rise = tl.load(scales + row)
    fall = tl.load(scales + rows + row)
    hit = tl.load(scales + 2 * rows + row)
    begin = tl.program_id(1) * (F.BLOCK * F.TILES)
    for first in range(begin, tl.minimum(begin + F.BLOCK * F.TILES, C), F.BLOCK):
        c, place, inside = _columns(first, C, stride[1], F)
        x = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
        class_weight = _class_weight(weight, c + first_class, inside, F)
        d = _slope(x, peak, log_sum, rise, fall, class_weight, F)
        d = tl.where(c == t, d - hit, d)
        tl.store(base + place, d.to(base.dtype.element_ty), mask=inside)


def slope_calls(logits, target, class_weight, peak, log_sum, scales, first):
    rows, C = logits.shape
    block = max(16, min(4096, triton.next_power_of_2(C)))
    F = Features(BLOCK=block, WEIGHT=class_weight is not None, SMOOTH=True, TILES=4)
    arguments = (logits, logits.stride(), target, class_weight, peak, log_sum, scales, rows, C,
                 first)  # fmt: skip
    grid = (rows, triton.cdiv(C, block * 4))
    yield Call(_block_slope, grid, arguments, F, max(1, min(16, block // 256)), 2)


def linear_cross_entropy_slope(*args):
    for call in slope_calls(*args):
        call.run()
