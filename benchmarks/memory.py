"""Peak memory of one call in a fresh process: what it needed above what its inputs already held."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from . import providers
from .ops.attention import timed_call
from .ops.attention_case import Case, tensors

TIMEOUT_S = 300
# Where ``python -m`` finds this package: the checkout's root when it runs from there uninstalled.
SOURCE_ROOT = None if __package__.startswith("fasttx") else Path(__file__).resolve().parent.parent


def peak(case: Case, direction: str, provider: str, threads: int, device: str) -> int | None:
    """Bytes above the inputs at the highest point of one call; None where it could not be had.

    On a CPU: growth of the resident set between the call's start and its peak, outputs and kept
    residuals included, inputs not. On CUDA: torch's own allocation statistics.
    """
    request = {
        "case": asdict(case),
        "direction": direction,
        "provider": provider,
        "threads": threads,
        "device": device,
        "backend": providers.find()["fasttx"].BACKEND,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(request)],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"},
        cwd=SOURCE_ROOT,
    )  # fmt: skip
    if done.returncode != 0:
        return None
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def _measure(request: dict) -> int:
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    device = torch.device(request["device"])
    provider = providers.find()[request["provider"]]
    provider.BACKEND = request["backend"]
    small = Case(**{**request["case"], "batch": 1, "queries": 64, "keys": 64})
    _call(small, provider, request["direction"], device)()
    call = _call(case, provider, request["direction"], device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _resident_growth(call)


def _call(case: Case, provider, direction: str, device: torch.device):
    x = tensors(case, device)
    call, leaves = provider.attention(case, x, False)
    return timed_call(call, leaves, x.dout, direction)


def _resident_growth(call) -> int:
    """Free pages go back to the system first, so that reuse of old ones does not hide growth."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        kept = call()
        high = _status("VmHWM")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        kept = call()
        high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del kept
    return max(0, high - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": _measure(json.loads(sys.argv[1]))}))
