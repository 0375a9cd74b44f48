"""What the machine itself can do, measured in the same run: the yardstick of every share column."""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .harness import Clock, ThreadClock, clock_for

GEMM_SIZE = 1024
GPU_GEMM_SIZE = 8192
BANDWIDTH_BYTES = 128 << 20
SECONDS = 0.25
PEAK_ROUNDS = 200_000


@dataclass
class Limits:
    """Best of a few tries each, on ``threads`` threads: FLOP/s and byte/s.

    ``gemm``: torch's own square matrix product per dtype. ``peak``: a loop of nothing but
    multiply-add instructions in registers, where the native library offers that probe.
    ``read``: sum of a large array. ``copy``: bytes read plus bytes written.
    """

    device: str
    threads: int
    gemm: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    read: float = 0.0
    copy: float = 0.0

    def flops(self, dtype: str) -> tuple[float, str] | None:
        """The highest arithmetic rate seen for a dtype, and where it was seen."""
        found = []
        if self.gemm.get(dtype):
            found.append((self.gemm[dtype], f"torch {dtype} matrix product, {self.threads} thr."))
        if self.peak.get(dtype):
            found.append((self.peak[dtype], f"{dtype} multiply-add peak, {self.threads} thr."))
        return max(found, default=None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(device: torch.device, threads: int, dtypes: dict[str, torch.dtype]) -> Limits:
    clock = clock_for(device, threads)
    limits = Limits(str(device), threads)
    for name, dtype in dtypes.items():
        limits.gemm[name] = gemm(dtype, device, threads)
        peak = _native_peak(name, ThreadClock()) if device.type == "cpu" else 0.0
        if peak:
            limits.peak[name] = peak * threads
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    limits.read = source.nbytes / _best(clock, source.sum)
    limits.copy = 2.0 * source.nbytes / _best(clock, lambda: target.copy_(source))
    return limits


def gemm(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """FLOP/s of torch's own square matrix product."""
    size = GPU_GEMM_SIZE if device.type == "cuda" else GEMM_SIZE
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    clock = clock_for(device, threads)
    return 2.0 * size**3 / _best(clock, lambda: torch.mm(a, b, out=out))


def _best(clock: Clock, call) -> float:
    """Fastest of many calls: a limit is what the machine can do when nothing else disturbs it."""
    call()
    best, deadline, tries = float("inf"), time.monotonic() + SECONDS, 0
    while tries < 5 or time.monotonic() < deadline:
        best = min(best, clock.measure(call, 1)[0])
        tries += 1
    return best


def _native_peak(dtype: str, clock: Clock) -> float:
    """FLOP/s of one thread doing multiply-adds in registers; 0 where there is no such probe."""
    try:
        probe = getattr(importlib.import_module("fasttx._C"), "_peak", None)
    except ImportError:
        return 0.0
    if probe is None or dtype not in ("fp32", "bf16"):
        return 0.0
    work = probe(dtype == "bf16", PEAK_ROUNDS)
    if not work:
        return 0.0
    return work / _best(clock, lambda: probe(dtype == "bf16", PEAK_ROUNDS))
