"""Compile attention_map's kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.attention_map_compile
"""

import json

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.attention_map import map_calls

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


def main() -> None:
    for arch, target in compile_check.TARGETS.items():
        nvidia = target[0] == "cuda"
        resources = compile_check._nvidia_resources if nvidia else compile_check._amd_resources
        for config, pool, chosen in CONFIGS:
            for call in calls(arch, config, pool, chosen):
                compiled = compile_check.compile_call(call, target)
                row = {"kernel": call.kernel.__name__, "arch": arch, "config": str(config)}
                row |= {"shared": compiled.metadata.shared, **resources(compiled)}
                row["limit"] = compile_check.SHARED_BYTES[arch]
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
