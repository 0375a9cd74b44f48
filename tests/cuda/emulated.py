"""The CUDA kernels as backend "cuda" of ops on CPU tensors: csrc/cuda and its bindings, compiled
for the emulator."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fasttx.op import OPS, Kernel
from tests.emulator import instructions
from tests.emulator.build import ROOT, build


def compiled(name: str, sources: list[Path], flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """These kernels and bindings as ops of the namespace fasttx_`name`."""
    torch_folder = Path(torch.__file__).parent
    flags = [*flags, "-isystem", str(torch_folder / "include")]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-unused-function"]
    flags += [f"-DFASTTX_CUDA_LIBRARY=fasttx_{name}", "-DFASTTX_CUDA_KEY=CPU"]
    libraries = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib"]
    path = str(build(name, sources, flags, libraries))
    torch.ops.load_library(path)
    return instructions.load(path)


@functools.cache
def library() -> ctypes.CDLL:
    sources = sorted((ROOT / "csrc/cuda").glob("**/*.cu"))
    return compiled("emulated", [*sources, *sorted((ROOT / "csrc/ops/cuda").glob("*.cpp"))])


def function_of(row: Kernel, name: str = "emulated"):
    """What a row of backend "cuda" calls, in the library `name`."""
    ops = getattr(torch.ops, f"fasttx_{name}")
    return getattr(ops, row.target.removeprefix("native:")).default


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
                function=function_of(row),
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
