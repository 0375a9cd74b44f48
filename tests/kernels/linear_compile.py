"""Compile the kernels of linear and ffn for GPUs that are not there; one JSON row a kernel and
target.

TRITON_INTERPRET=0 python -m tests.kernels.linear_compile [arch ...]
"""

import sys

import torch
from fasttx.kernels import compile_check
from fasttx.kernels.ffn import ffn_backward_calls, ffn_forward_calls
from fasttx.kernels.linear import backward_calls, forward_calls

from . import ahead

# linear: shape (M, K, N); ffn: (M, K, F, N).
CONFIGS = [
    {"op": "linear"},
    {"op": "linear", "activation": 1, "dtype": "fp16", "transposed": True, "residual": True},
    {"op": "linear", "activation": 2, "dtype": "fp32", "shape": (4096, 770, 3070)},
    {"op": "linear", "activation": 4, "shape": (8, 768, 3072)},
    {"op": "linear", "activation": 1, "dtype": "fp32", "tf32": True},
    {"op": "linear", "activation": 3, "shape": (1, 770, 770), "dtype": "fp32"},
    {"op": "linear", "activation": 1, "shape": (4090, 770, 3070)},
    {"op": "linear", "shape": (4090, 770, 3070), "transposed": True},
    {"op": "ffn", "activation": 1, "dropout": 0.1},
    {"op": "ffn", "activation": 2, "shape": (100, 768, 3072, 768)},
    {"op": "ffn", "activation": 1, "dropout": 0.1, "dtype": "fp32"},
    {"op": "ffn", "activation": 4, "gate": True},
    {"op": "ffn", "activation": 1, "gate": True, "dropout": 0.1, "recompute": True},
    {"op": "ffn", "activation": 2, "gate": True, "dropout": 0.1, "dtype": "fp32"},
    {"op": "ffn", "activation": 2, "gate": True, "dropout": 0.1, "shape": (4090, 770, 3070, 770)},
]


def calls(arch, op, activation=0, dtype="bf16", shape=None, transposed=False, residual=False,
          gate=False, dropout=0.0, recompute=False, tf32=False):  # fmt: skip
    def empty(*shape, dtype=compile_check.DTYPES[dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(n, k):
        return empty(k, n).t() if transposed else empty(n, k)

    if op == "linear":
        M, K, N = shape or (4096, 768, 3072)
        x, w, bias, out = empty(M, K), weight(N, K), empty(N), empty(M, N)
        pre, added = out if activation else None, out if residual else None
        rest = (None, None, added, None, activation, 0.0, 0, bool(activation))
        yield from forward_calls(arch, out, pre, None, x, w, bias, *rest)
        yield from backward_calls(arch, x, w, bias, x, w, pre, out, activation, 7)
        return
    M, K, F, N = shape or (4096, 768, 3072, 768)
    x, w1, b1, hidden = empty(M, K), weight(F, K), empty(F), empty(M, F)
    w2, b2, out = weight(N, F), empty(N), empty(M, N)
    pre = None if recompute else hidden
    w_gate, b_gate, pre_gate = (w1, b1, pre) if gate else (None, None, None)
    seed = empty(1, dtype=torch.int64) if dropout else None
    scalars = (activation, dropout, dropout)
    yield from ffn_forward_calls(
        arch, out, pre, pre_gate, x, w1, b1, w2, b2, w_gate, b_gate, seed, *scalars, not recompute
    )
    gradients = (x, w1, b1, w2, b2, w_gate, b_gate)
    inputs = (x, pre, pre_gate, out, w1, b1, w2, w_gate, b_gate, seed)
    yield from ffn_backward_calls(arch, *gradients, *inputs, *scalars, 127 if gate else 31)


def rows(calls, job) -> list[dict]:
    arch, config = job
    torch.backends.cuda.matmul.fp32_precision = "tf32" if config.get("tf32") else "ieee"
    found = []
    for call in calls(arch, **config):
        row = {"config": str(config), "tile": str(call.features), "warps": call.num_warps}
        row |= {"rows": getattr(call.features, "BLOCK_M", 0)}
        row |= {"fp32": config.get("dtype") == "fp32", **compile_check.compiled_row(call, arch)}
        found.append(row)
    return found


if __name__ == "__main__":
    ahead.print_rows(calls, CONFIGS, sys.argv[1:] or tuple(compile_check.TARGETS), rows)
