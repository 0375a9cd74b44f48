"""The CUDA kernels as backend "cuda" of ops on CPU tensors: csrc/cuda and its bindings, compiled
for the emulator."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fasttx.op import OPS
from tests.emulator import instructions
from tests.emulator.build import ROOT, build


@functools.cache
def library():
    torch_folder = Path(torch.__file__).parent
    flags = ["-isystem", str(torch_folder / "include")]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-unused-function"]
    flags += ["-DFASTTX_CUDA_LIBRARY=fasttx_emulated", "-DFASTTX_CUDA_KEY=CPU"]
    sources = sorted((ROOT / "csrc/cuda").glob("**/*.cu"))
    sources += sorted((ROOT / "csrc/ops/cuda").glob("*.cpp"))
    libraries = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib"]
    path = str(build("kernels", sources, flags, libraries))
    torch.ops.load_library(path)
    return instructions.load(path)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """backend="cuda" runs on CPU tensors, by each CUDA row's own Needs but the device."""
    library()
    before = {op: op.tables for op in OPS.values()}
    for op in before:
        rows = [
            replace(
                row,
                needs=replace(row.needs, sm=0, by_name=True),
                function=getattr(
                    torch.ops.fasttx_emulated, row.target.removeprefix("native:")
                ).default,
            )
            for row in op.tables.get("cuda", ())
            if row.backend == "cuda"
        ]
        op.tables = {**op.tables, "cpu": [*op.tables["cpu"], *rows]}
    try:
        yield
    finally:
        for op, tables in before.items():
            op.tables = tables


def mode(eager: bool = False, seed: int = 0):
    return instructions.mode(library(), eager, seed)


def traffic() -> instructions.Traffic:
    return instructions.traffic(library())


@contextlib.contextmanager
def card(sm: int) -> Iterator[None]:
    """The ops take the kernels of a card of this compute capability; 90 without it."""
    library().emulator_compute_capability(sm)
    try:
        yield
    finally:
        library().emulator_compute_capability(90)
