"""Compile the rope kernel for GPUs that are not there; one JSON row a configuration and target.

TRITON_INTERPRET=0 python -m tests.kernels.rope_compile
"""

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.rope import rope_calls

from . import ahead

CONFIGS = [
    {},
    {"D": 128, "interleaved": True, "dtype": "fp32"},
    {"D": 256, "rotary": 64, "interleaved": True},
    {"D": 80, "rotary": 32, "twice": True, "adjoint": True, "transposed": True},
    {"D": 512, "dtype": "fp16", "adjoint": True, "in_place": True},
]


def calls(arch, dtype="bf16", B=2, H=12, G=4, S=2048, D=64, rotary=None, twice=False,
          interleaved=False, adjoint=False, transposed=False, in_place=False):  # fmt: skip
    def empty(*shape, dtype=compile_check.DTYPES[dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    rotary = D if rotary is None else rotary
    q, k = empty(B, H, S, D), empty(B, G, S, D)
    if transposed:
        q, k = empty(B, S, H, D).transpose(1, 2), empty(B, S, G, D).transpose(1, 2)
    cos = empty(1, S, rotary // 2 if twice else rotary, dtype=torch.float32)
    yield from rope_calls(arch, q, k, q, k, cos, cos, rotary, interleaved, adjoint, in_place)


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS)
