"""Kernels compiled for GPUs that are not there.

Triton chooses its interpreter when it is imported, so this happens in a process of its own: the
modules ..._compile name their calls and print a JSON row a kernel and target, tests read the rows.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from fasttx.kernels.compile_check import TARGETS, compiled_row

ROOT = Path(__file__).parents[2]


def print_rows(calls, configs, archs=tuple(TARGETS), rows=None) -> None:
    """A line for each of calls(arch, *config) or calls(arch, **config), or for what
    rows(calls, (arch, config)) makes of them."""
    jobs = [(arch, config) for arch in archs for config in configs]
    with ProcessPoolExecutor(2) as pool:
        for found in pool.map(partial(rows or _rows, calls), jobs):
            for row in found:
                print(json.dumps(row), flush=True)


def made(calls, arch: str, config):
    return calls(arch, **config) if isinstance(config, dict) else calls(arch, *config)


def _rows(calls, job) -> list[dict]:
    arch, config = job
    return [compiled_row(c, arch) | {"config": str(config)} for c in made(calls, arch, config)]


def run(module: str, *arguments: str) -> list[dict]:
    """The rows that a module prints, under the compiler."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def compiled(name: str, kernels: set[str] | None = None) -> list[dict]:
    """The rows of tests.kernels.<name>_compile: every target has exactly these kernels, none
    spills, shared memory is within the limit."""
    rows = run(f"tests.kernels.{name}_compile")
    for arch in TARGETS:
        found = {row["kernel"] for row in rows if row["arch"] == arch}
        assert found == kernels if kernels else found, (arch, found)
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= row["limit"], row
    return rows
