"""Compile the cross-entropy kernels for GPUs that are not there; one JSON row a kernel and target.

TRITON_INTERPRET=0 python -m tests.kernels.cross_entropy_compile
"""

import json

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.cross_entropy import backward_calls, forward_calls, rescale_calls
from fasttx.kernels.linear_cross_entropy import slope_calls


def calls(dtype, V, weight, smoothing, z_loss, reduction, gradient):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, target = empty(2, 40, V, dtype=dtype), empty(80, dtype=torch.int64)
    weight = empty(V) if weight else None
    loss = empty() if reduction else empty(80)
    scalars = (-100, reduction, smoothing, z_loss)
    residuals = (empty(80), empty(80), empty(2))
    if gradient:
        yield from forward_calls(
            loss, None, None, empty(2), empty(), logits, target, weight, *scalars, True
        )
        yield from rescale_calls(logits, loss, empty(), target, -100)
    else:
        yield from forward_calls(loss, *residuals, None, logits, target, weight, *scalars, False)
        arguments = (torch.empty_like(logits), loss, logits, target, weight, *residuals, *scalars)
        yield from backward_calls(*arguments)
        residuals = (empty(40), empty(40), empty(3, 40))
        yield from slope_calls(logits[0], target[:40], weight, *residuals, 1000)


def main() -> None:
    configs = [
        (torch.bfloat16, 50257, False, 0.0, 0.0, 1, False),
        (torch.float32, 50257, True, 0.1, 1e-4, 1, False),
        (torch.float16, 32128, True, 0.1, 1e-4, 1, True),
        (torch.bfloat16, 10, False, 0.1, 0.0, 0, True),
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
