"""Compile the softmax kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.softmax_compile
"""

import json

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.softmax import backward_calls, forward_calls


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


def main() -> None:
    configs = [
        (torch.bfloat16, 1024, None, False, False),
        (torch.float32, 512, torch.float32, False, True),
        (torch.float16, 1 << 18, torch.bfloat16, True, False),
        (torch.bfloat16, 768, "bool", True, True, True),
    ]
    for arch, target in compile_check.TARGETS.items():
        nvidia = target[0] == "cuda"
        resources = compile_check._nvidia_resources if nvidia else compile_check._amd_resources
        for config in configs:
            for call in calls(arch, *config):
                compiled = compile_check.compile_call(call, target)
                row = {"kernel": call.kernel.__name__, "arch": arch, "config": str(config)}
                row |= {"shared": compiled.metadata.shared, **resources(compiled)}
                row["limit"] = compile_check.SHARED_BYTES[arch]
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
