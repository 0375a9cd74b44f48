"""Compile the sampling kernel for GPUs that are not there; one JSON row a target and configuration.

TRITON_INTERPRET=0 python -m tests.kernels.sample_compile
"""

import json

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.sample import sample_calls


def calls(dtype, top_k, top_p, greedy, V=50257):
    logits = torch.empty(8, V, dtype=dtype, device="meta")
    ids = torch.empty(8, dtype=torch.int64, device="meta")
    seed = None if greedy else torch.empty(1, dtype=torch.int64, device="meta")
    yield from sample_calls(ids, logits, seed, 0.0 if greedy else 2e7, top_k, top_p, greedy)


def main() -> None:
    configs = [
        (torch.bfloat16, 50, 0.9, False),
        (torch.float32, 0, 1.0, False),
        (torch.float16, 0, 1.0, True),
    ]
    for arch, target in compile_check.TARGETS.items():
        nvidia = target[0] == "cuda"
        resources = compile_check._nvidia_resources if nvidia else compile_check._amd_resources
        for config in configs:
            for call in calls(*config):
                compiled = compile_check.compile_call(call, target)
                row = {"kernel": call.kernel.__name__, "arch": arch, "config": str(config)}
                row |= {"shared": compiled.metadata.shared, **resources(compiled)}
                row["limit"] = compile_check.SHARED_BYTES[arch]
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
