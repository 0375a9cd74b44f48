"""csrc/cuda as nvcc compiles it: registers, spills and shared memory of every kernel."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.emulator.build import HERE, ROOT

ARCHS = ("80", "90a")
CUDA = ROOT / "csrc/cuda"
SOURCES = [*sorted(CUDA.glob("**/*.cu")), *sorted(HERE.glob("kernels/*.cu"))]


def name_of(source: Path) -> str:
    """A kernel of the library by its path in csrc/cuda, one of the emulator by its file's name."""
    return source.relative_to(CUDA).as_posix() if source.is_relative_to(CUDA) else source.name


def archs_of(source: Path) -> tuple[str, ...]:
    """The architectures setup.py compiles a source for."""
    return {"sm80": ARCHS[:1], "sm90": ARCHS[1:]}.get(source.parent.name, ARCHS)


@dataclass(frozen=True)
class Resources:
    """One kernel for one architecture, as ptxas reports it. stack, stores, loads: bytes."""

    source: str
    kernel: str
    arch: str
    registers: int
    stack: int
    stores: int
    loads: int
    shared: int


def nvcc() -> str | None:
    places = [os.environ.get("FASTTX_NVCC"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def compiled(source: Path) -> tuple[list[Resources], dict[str, str]]:
    """Every kernel of a file, and its PTX an architecture. Raises with nvcc's message."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "--keep"]
        command += [f"--keep-dir={folder}", "-c", str(source), "-o", f"{folder}/out.o"]
        archs = archs_of(source)
        command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"{source.name}: nvcc failed\n{done.stdout}{done.stderr}")
        # Products that wait for each other, or registers that stay where they are: only said so.
        lost = re.findall(r".*(?:wgmma.*serialized|setmaxnreg.*ignored).*", done.stderr)
        if lost and source.is_relative_to(CUDA):  # the emulator's demonstrations need not be fast
            raise RuntimeError(f"{source.name}: {lost[0]}")
        names = [f"{source.stem}.compute_{a}.ptx" for a in archs]
        if len(archs) == 1:
            names = [f"{source.stem}.ptx"]
        ptx = {a: Path(folder, n).read_text() for a, n in zip(archs, names, strict=True)}
        return _resources(name_of(source), done.stderr), ptx


def _resources(source: str, log: str) -> list[Resources]:
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        kernel, arch = re.match(r"'(\S+)' for 'sm_(\w+)'", part).groups()
        numbers = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Resources(
                source, kernel, arch, int(registers[1]), *map(int, numbers.groups()),
                int(shared[1]) if shared else 0,
            )
        )  # fmt: skip
    return found


@functools.cache
def everything() -> tuple[list[Resources], dict[tuple[str, str], str]]:
    """All kernels, and the PTX by (file, architecture)."""
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(SOURCES, pool.map(compiled, SOURCES), strict=True))
    resources = [r for found, _ in results.values() for r in found]
    return resources, {
        (name_of(s), a): t for s, (_, ptx) in results.items() for a, t in ptx.items()
    }
