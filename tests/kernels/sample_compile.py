"""Compile the sampling kernel for GPUs that are not there; one JSON row a target and configuration.

TRITON_INTERPRET=0 python -m tests.kernels.sample_compile
"""

import torch
from fasttx.kernels.sample import sample_calls

from . import ahead

CONFIGS = [
    (torch.bfloat16, 50, 0.9, False),
    (torch.float32, 0, 1.0, False),
    (torch.float16, 0, 1.0, True),
]


def calls(arch, dtype, top_k, top_p, greedy, V=50257):
    logits = torch.empty(8, V, dtype=dtype, device="meta")
    ids = torch.empty(8, dtype=torch.int64, device="meta")
    seed = None if greedy else torch.empty(1, dtype=torch.int64, device="meta")
    yield from sample_calls(ids, logits, seed, 0.0 if greedy else 2e7, top_k, top_p, greedy)


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS)
