"""The class of this machine, under which measurements are kept: processors alike enough that what
is fastest on one is so on the others."""

import functools
import os
import platform
from pathlib import Path

__all__ = ["cpu_class", "cpuinfo", "isa"]


@functools.cache
def cpu_class() -> str:
    """Vendor, core and instruction set, e.g. cpu-amd-zen5-avx512_bf16; with the level that
    FASTTX_CPU_ISA forces, which makes it another machine."""
    cpu = cpuinfo()
    forced = os.environ.get("FASTTX_CPU_ISA")
    return cpu_class_of(
        cpu.get("model name", platform.processor() or platform.machine()),
        int(cpu.get("cpu family", -1)),
        int(cpu.get("model", -1)),
        isa(set(cpu.get("flags", "").split())),
    ) + (f"-as-{forced}" if forced else "")


def cpu_class_of(name: str, family: int, model: int, isa: str) -> str:
    name = name.lower()
    vendor = next((v for v in ("amd", "intel", "arm", "apple") if v in name), platform.machine())
    return "-".join(filter(None, ("cpu", vendor, _core_name(vendor, family, model), isa)))


def isa(flags: set[str]) -> str:
    """The best instruction set of those fasttx builds for."""
    if "amx_bf16" in flags:
        return "amx_bf16"
    if "avx512_bf16" in flags:
        return "avx512_bf16"
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "baseline"


def _core_name(vendor: str, family: int, model: int) -> str:
    if vendor == "amd" and family == 26:
        return "zen5"
    if vendor == "amd" and family == 25:
        return "zen4" if model in range(0x10, 0x20) or model >= 0x60 else "zen3"
    return f"family{family}-model{model}" if family >= 0 else ""


def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; nothing where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
