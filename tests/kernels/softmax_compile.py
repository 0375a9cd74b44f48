"""Compile the softmax kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.softmax_compile
"""

import torch
from fasttx.kernels.softmax import backward_calls, forward_calls

from . import ahead

CONFIGS = [
    (torch.bfloat16, 1024, None, False, False),
    (torch.float32, 512, torch.float32, False, True),
    (torch.float16, 1 << 18, torch.bfloat16, True, False),
    (torch.bfloat16, 768, "bool", True, True, True),
]


def calls(arch, dtype, N, mask, log, causal, transposed=False):
    """mask: None, "bool" or a floating dtype, shared by the batch."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(8, 12, N, 128).transpose(2, 3) if transposed else empty(8, 12, 128, N)
    kind = torch.bool if mask == "bool" else mask
    added = None if mask is None else empty(1, 12, 128, N, dtype=kind)
    scalars = (0.125, causal, causal, log)
    yield from forward_calls(torch.empty_like(x), x, added, *scalars, False)
    need = 3 if mask not in (None, "bool") else 1
    yield from backward_calls(torch.empty_like(x), added, x, x, x, added, *scalars, need)


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS)
