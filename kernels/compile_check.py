"""Compile the Triton kernels ahead of time for GPUs that are not there, and report what came out.

    TRITON_INTERPRET=0 python -m fasttx.kernels.compile_check [--jobs N] [--all] [--arch A]

One JSON row a kernel and target: registers, bytes spilled, shared memory, matrix instructions.
The calls are the launchers' own, made from meta tensors, so what is compiled is what would run.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from .tiles import SHARED_BYTES

TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def meta_arguments(dtype="bf16", B=2, H=8, G=8, S=1024, T=1024, D=64, DV=None, mask=None,
                   mask_dtype="bool", alibi=False, positions=False, table=False, packed=False,
                   softcap=0.0, dropout=0.0, left=-1, right=-1, lower_right=False):  # fmt: skip
    """The op's inner inputs and scalars for one configuration, on the meta device."""
    kind = DTYPES[dtype]
    DV = D if DV is None else DV

    def empty(*shape, dtype=kind):
        return torch.empty(*shape, dtype=dtype, device="meta")

    B = 1 if packed else B
    masks = {"bool": torch.bool, **DTYPES}
    tensors = [
        empty(B, H, S, D),
        empty(B, G, T, D),
        empty(B, G, T, DV),
        empty(*mask, dtype=masks[mask_dtype]) if mask else None,
        empty(1, H, dtype=torch.float32) if alibi else None,
        empty(B, T, dtype=torch.float32) if positions else None,
        empty(32, H, dtype=torch.float32) if table else None,
        empty(257, dtype=torch.int32) if table else None,
        empty(9, dtype=torch.int32) if packed else None,
        empty(9, dtype=torch.int32) if packed else None,
        empty(1, dtype=torch.int64) if dropout else None,
    ]
    scalars = [D**-0.5, softcap, dropout, left, right, lower_right, 0]
    return tensors, scalars


def calls_of(arch: str, direction: str, config: dict) -> list:
    """The kernel calls that one configuration launches."""
    config = dict(config)
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if config.pop("tf32", False) else "ieee"
    try:
        return _calls_of(arch, direction, *meta_arguments(**config))
    finally:
        switch.fp32_precision = before


def _calls_of(arch: str, direction: str, tensors: list, scalars: list) -> list:
    from . import attention, attention_bwd

    q, k, v = tensors[:3]
    out = q.new_empty(q.size(0), q.size(2), q.size(1), v.size(3)).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if direction == "fwd":
        return list(attention.forward_calls(arch, out, lse, *tensors, *scalars))
    mask, table = tensors[3], tensors[6]
    trained = mask is not None and mask.dtype != torch.bool
    gradients = [
        *(torch.empty_like(x) for x in (q, k, v)),
        torch.empty_like(mask) if trained else q.new_empty(0),
        q.new_empty(0) if table is None else torch.empty_like(table),
    ]
    need = 7 + 8 * trained + 16 * (table is not None)
    return list(
        attention_bwd.backward_calls(
            arch, *gradients, torch.empty_like(out), None, q, k, v, out, lse, *tensors[3:],
            *scalars, need,
        )
    )  # fmt: skip


def compile_call(call, target):
    """Compile one launcher call for a target, specialized just as its launch would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = call.kernel, GPUTarget(*target)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    bound, specialization, _ = binder(*call.args, F=call.features, **options)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, options, bound, specialization, None
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def _nvidia_tool(name: str) -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin", name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _nvidia_resources(compiled) -> dict:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        with open(cubin, "wb") as file:
            file.write(compiled.asm["cubin"])
        usage = _run(_nvidia_tool("cuobjdump"), "--dump-resource-usage", cubin)
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        spills = int(found["STACK"]) + int(found["LOCAL"])
        if spills:  # a stack frame alone is no spill: ask the assembler
            source = os.path.join(folder, "kernel.ptx")
            with open(source, "w") as file:
                file.write(ptx)
            target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
            tool = _nvidia_tool("ptxas-blackwell" if target.startswith("sm_1") else "ptxas")
            if not os.path.exists(tool):
                tool = _nvidia_tool("ptxas")
            output = os.path.join(folder, "out")
            with contextlib.suppress(subprocess.CalledProcessError):  # then the frame must do
                log = _run(tool, "-v", f"--gpu-name={target}", source, "-o", output)
                spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return {
        "registers": int(found["REG"]),
        "spills": spills,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "tf32": ptx.count(".tf32"),
    }


def _amd_resources(compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count"),
        "mfma": text.count("v_mfma"),
        "tf32": text.count("xf32"),
    }


def compiled_row(call, arch: str) -> dict:
    """A call compiled for a target of TARGETS: kernel, registers, spills, shared memory and its
    limit, instructions of the matrix units."""
    compiled = compile_call(call, TARGETS[arch])
    resources = _nvidia_resources if TARGETS[arch][0] == "cuda" else _amd_resources
    used = {"shared": compiled.metadata.shared, "limit": SHARED_BYTES[arch]}
    return {"kernel": call.kernel.__name__, "arch": arch, **used, **resources(compiled)}


def check(job) -> list[dict]:
    arch, direction, config = job
    rows = []
    for call in calls_of(arch, direction, config):
        row = {
            "kernel": call.kernel.__name__,
            "arch": arch,
            "direction": direction,
            "config": config,
            "tile": [call.features.BLOCK_M, call.features.BLOCK_N, call.num_warps, call.num_stages],
        }
        began = time.perf_counter()
        try:
            row |= compiled_row(call, arch)
        except Exception as error:
            rows.append(
                {**row, "error": f"{type(error).__name__}: {error.__cause__ or error}"[-600:]}
            )
            continue
        rows.append(row | {"seconds": round(time.perf_counter() - began, 2)})
    return rows


def run(jobs: list, workers: int):
    with ProcessPoolExecutor(workers) as pool:
        for rows in pool.map(check, jobs):
            yield from rows


_KEYS_MASK = {"mask": (2, 1, 1, 1000), "T": 1000}
_PAIRS_MASK = {"mask": (1, 8, 1024, 1024), "mask_dtype": "bf16"}
_EVERYTHING = _PAIRS_MASK | {"dropout": 0.1, "softcap": 5.0, "right": 0, "alibi": True}

# Run by the tests: each kernel on each target, each feature on one.
REPRESENTATIVE = [
    *((arch, direction, {"right": 0}) for arch in TARGETS for direction in ("fwd", "bwd")),
    ("sm90", "fwd", {}),
    ("sm90", "bwd", _KEYS_MASK | {"dropout": 0.1}),
    ("sm90", "bwd", {"table": True, "dropout": 0.1}),
    ("sm90", "bwd", _PAIRS_MASK),
    ("sm90", "fwd", {"D": 128, "packed": True, "right": 0, "lower_right": True}),
    ("sm90", "fwd", {"D": 40, "dtype": "fp32", "right": 0}),
    ("sm90", "bwd", {"D": 128, "dtype": "fp32"}),
    ("sm90", "fwd", {"D": 40, "dtype": "fp32", "tf32": True}),
]


def every_job():
    """All targets, dtypes and head widths, plain and with all features: over an hour of compiling
    on two cores."""
    for arch in TARGETS:
        for dtype in DTYPES:
            for D in (64, 128, 256):
                for config in (
                    {},
                    {"right": 0},
                    {"left": 128, "right": 0, "packed": True},
                    _KEYS_MASK | {"dropout": 0.1},
                    {"table": True, "dropout": 0.1},
                    _EVERYTHING,
                ):
                    for direction in ("fwd", "bwd"):
                        yield arch, direction, {"dtype": dtype, "D": D, **config}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--all", action="store_true", help="every target, dtype, width, feature")
    parser.add_argument("--arch", choices=TARGETS, help="this target only")
    options = parser.parse_args()
    jobs = list(every_job()) if options.all else REPRESENTATIVE
    jobs = [job for job in jobs if options.arch in (None, job[0])]
    for row in run(jobs, options.jobs):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
