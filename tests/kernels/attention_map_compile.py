"""Compile attention_map's kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.attention_map_compile
"""

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.attention_map import map_calls

from . import ahead

CONFIGS = [
    ({"right": 0}, 0, False),
    ({"mask": (1, 8, 1024, 1024), "mask_dtype": "bf16", "softcap": 5.0}, 32, True),
    ({"D": 128, "table": True, "left": 64, "right": 64}, 0, True),
    ({"D": 40, "dtype": "fp32", "mask": (2, 1, 1, 1024), "alibi": True}, 16, False),
]


def calls(arch, config, pool, chosen):
    (q, k, _, mask, slopes, positions, table, lut, *_), scalars = compile_check.meta_arguments(
        **config
    )
    scale, softcap, _, *band = scalars
    lse = torch.empty(q.shape[:3], device="meta")
    index = torch.empty(4, dtype=torch.int64, device="meta") if chosen else None
    h, r = (4, 4) if chosen else (q.size(1), q.size(2))
    out = torch.empty(q.size(0), h, pool or r, pool or k.size(2), device="meta")
    yield from map_calls(
        arch, out, q, k, lse, index, index, mask, slopes, positions, table, lut, scale, softcap,
        *band, pool,
    )  # fmt: skip


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS)
