"""Compile the rope kernel for GPUs that are not there; one JSON row a configuration and target.

TRITON_INTERPRET=0 python -m tests.kernels.rope_compile
"""

import json

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.rope import rope_calls

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


def main() -> None:
    for arch, target in compile_check.TARGETS.items():
        nvidia = target[0] == "cuda"
        resources = compile_check._nvidia_resources if nvidia else compile_check._amd_resources
        for config in CONFIGS:
            for call in calls(arch, **config):
                compiled = compile_check.compile_call(call, target)
                row = {"kernel": call.kernel.__name__, "arch": arch, "config": str(config)}
                row |= {"shared": compiled.metadata.shared, **resources(compiled)}
                print(json.dumps(row | {"limit": compile_check.SHARED_BYTES[arch]}), flush=True)


if __name__ == "__main__":
    main()
