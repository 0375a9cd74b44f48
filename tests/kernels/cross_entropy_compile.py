"""Compile the cross-entropy kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.cross_entropy_compile
"""

import torch
from fasttx.kernels.cross_entropy import backward_calls, forward_calls, rescale_calls
from fasttx.kernels.linear_cross_entropy import slope_calls

from . import ahead

CONFIGS = [
    (torch.bfloat16, 50257, False, 0.0, 0.0, 1, False),
    (torch.float32, 50257, True, 0.1, 1e-4, 1, False),
    (torch.float16, 32128, True, 0.1, 1e-4, 1, True),
    (torch.bfloat16, 10, False, 0.1, 0.0, 0, True),
]


def calls(arch, dtype, V, weight, smoothing, z_loss, reduction, gradient):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, target = empty(2, 40, V, dtype=dtype), empty(80, dtype=torch.int64)
    weight = empty(V) if weight else None
    loss = empty() if reduction else empty(80)
    scalars = (-100, reduction, smoothing, z_loss)
    residuals = (empty(80), empty(80), empty(2))
    if gradient:
        yield from forward_calls(
            loss, None, None, empty(2), empty(), logits, target, weight, *scalars, True
        )
        yield from rescale_calls(logits, loss, empty(), target, -100)
    else:
        yield from forward_calls(loss, *residuals, None, logits, target, weight, *scalars, False)
        arguments = (torch.empty_like(logits), loss, logits, target, weight, *residuals, *scalars)
        yield from backward_calls(*arguments)
        residuals = (empty(40), empty(40), empty(3, 40))
        yield from slope_calls(logits[0], target[:40], weight, *residuals, 1000)


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS)
