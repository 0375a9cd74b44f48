"""Compile the add_norm kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.add_norm_compile
"""

import torch
from fasttx.kernels.add_norm import backward_calls, forward_calls

from . import ahead

CONFIGS = [
    (torch.bfloat16, 768, False, False),
    (torch.bfloat16, 4096, True, False),
    (torch.float32, 4096, True, True),
    (torch.float16, 10000, True, False),
]


def calls(arch, dtype, N, full, rms, M=4096):
    """full: residual, x_bias, dropout, the sum returned, rows in two strides."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, p, stats = empty(8, M // 8, N), empty(N), empty(1 if rms else 2, M, dtype=torch.float32)
    residual = empty(M // 8, 8, N).transpose(0, 1) if full else None
    seed, x_bias = (empty(1, dtype=torch.int64), p) if full else (None, None)
    dropout_p, total = (0.1, x) if full else (0.0, None)
    yield from forward_calls(
        arch, x, total, stats, x, residual, p, p, x_bias, seed, 1e-5, dropout_p, rms, full, False
    )
    need, dout = (31, None if rms else x) if full else (13, x)
    yield from backward_calls(
        arch,
        x,
        x,
        p,
        p,
        p,
        x,
        stats,
        dout,
        total,
        residual,
        p,
        p,
        x_bias,
        seed,
        dropout_p,
        rms,
        need,
    )


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS)
