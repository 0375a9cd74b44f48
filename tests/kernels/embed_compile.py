"""Compile the embed kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.embed_compile
"""

import torch
from fasttx.kernels.embed import backward_calls, forward_calls

from . import ahead

CONFIGS = [
    (torch.bfloat16, 768, False, 1),
    (torch.float16, 1024, False, 0),
    (torch.float32, 4096, True, 2),
    (torch.bfloat16, 10000, True, 1),
]


def calls(arch, dtype, N, full, norm, B=8, S=512):
    """full: position ids, segments, dropout, scale, a transposed upstream gradient."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    ids = empty(B, S, dtype=torch.int64)
    more = (ids, ids, empty(1, dtype=torch.int64)) if full else (None, None, None)
    p = empty(N) if norm else None
    weights = (empty(50257, N), empty(1024, N), empty(2, N) if full else None, p, p)
    stats = empty(2, B * S, dtype=torch.float32)
    dropout_p, scale = (0.1, 2.0) if full else (0.0, 1.0)
    yield from forward_calls(
        arch, empty(B, S, N), stats, *weights, ids, *more, 0, 1, -1, norm, scale, 1e-5, dropout_p,
        False,
    )  # fmt: skip
    dout = empty(S, B, N).transpose(0, 1) if full else empty(B, S, N)
    gradients = [None if t is None else empty(*t.shape) for t in weights]
    need = (7 if full else 3) | (24 if norm else 0)
    yield from backward_calls(
        arch, gradients, weights, stats, dout, ids, *more, 0, 1, -1, norm, scale, dropout_p, need
    )


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS)
