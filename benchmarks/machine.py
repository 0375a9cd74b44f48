"""What was measured on: processor, memory, versions, load, in words a reader can compare."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fasttx.machine import cpu_class_of, cpuinfo, isa

PACKAGES = ("fasttx", "torch", "triton", "transformers", "numpy")


def describe() -> dict[str, Any]:
    cpu = cpuinfo()
    flags = set(cpu.get("flags", "").split())
    facts: dict[str, Any] = {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family": int(cpu.get("cpu family", -1)),
        "cpu_model": int(cpu.get("model", -1)),
        "cores": len(os.sched_getaffinity(0)),
        "isa": isa(flags),
        "hypervisor": "hypervisor" in flags,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        "environment": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith(("FASTTX_", "OMP_", "MKL_", "ONEDNN_", "DNNL_", "KMP_", "MALLOC_"))
        },
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_arch"] = f"sm_{properties.major}{properties.minor}"
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
    facts["class"] = machine_class(facts)
    return facts


def machine_class(facts: dict[str, Any]) -> str:
    """The folder name results are kept under, e.g. cpu-amd-zen5-avx512_bf16."""
    if "gpu" in facts:
        return "gpu-" + facts["gpu"].lower().replace(" ", "-")
    return cpu_class_of(facts["cpu"], facts["cpu_family"], facts["cpu_model"], facts["isa"])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit with + for uncommitted changes; None where there is no checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
