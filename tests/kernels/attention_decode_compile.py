"""Compile the decoding kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.attention_decode_compile
"""

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.attention_decode import append_calls, decode_calls

from . import ahead

CONFIGS = [
    {},
    {"dtype": "fp32", "S": 4, "H": 64},
    {"S": 4, "H": 32},
    {"D": 128, "page": 16, "S": 4, "H": 64},
    {"dtype": "fp32", "D": 256, "S": 4},
    {"dtype": "fp16", "D": 256, "H": 32, "S": 4, "softcap": 30.0, "left": 100},
    {"bias": "table", "S": 2, "start": True},
    {"dtype": "fp32", "D": 128, "H": 64, "bias": "positions", "S": 2, "page": 32, "splits": 1},
    {"bias": "alibi", "D": 80, "DV": 40, "splits": 1},
]


def calls(arch, dtype="bf16", B=2, H=8, G=2, S=1, T=4096, D=64, DV=None, page=0, bias="none",
          softcap=0.0, left=-1, right=0, start=False, splits=8):  # fmt: skip
    def empty(*shape, dtype=compile_check.DTYPES[dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    DV, single = DV or D, torch.float32
    shape = (64, G, page) if page else (B, G, T)
    q, k_cache, v_cache = empty(B, H, S, D), empty(*shape, D), empty(*shape, DV)
    lengths = empty(B, dtype=torch.int32)
    blocks = empty(B, T // page, dtype=torch.int32) if page else None
    rest = (
        lengths if start else None,
        blocks,
        empty(1, H, dtype=single) if bias in ("alibi", "positions") else None,
        empty(B, T, dtype=single) if bias == "positions" else None,
        empty(32, H, dtype=single) if bias == "table" else None,
        empty(257, dtype=torch.int32) if bias == "table" else None,
    )
    scalars = (D**-0.5, softcap, left, right)
    out = empty(B, S, H, DV).transpose(1, 2)
    yield from decode_calls(arch, out, q, k_cache, v_cache, lengths, *rest, *scalars, splits=splits)
    yield from append_calls(
        k_cache, v_cache, empty(B, G, S, D), empty(B, G, S, DV), lengths, blocks
    )


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS)
