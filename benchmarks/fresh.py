"""What only a fresh process can tell: the cold start, and the peak memory of one call.

cold start: wall seconds from the start of Python to the first answer: imports, what the provider
does to get ready (patching, conversion, compilation) and the first call. Making weights and inputs
does not count. peak memory: bytes above what lay there before the call, at its highest point; the
process was warmed on a small case where there is one.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from . import providers

TIMEOUT_S = 600
PACKAGE = __package__
# Where ``python -m`` finds this package: the checkout's root when it runs from there uninstalled.
SOURCE_ROOT = None if PACKAGE.startswith("fasttx") else Path(__file__).resolve().parent.parent
_BOOT = """\
import importlib, json, sys, time
request = json.loads(sys.argv[1])
for name in request["imports"]:
    importlib.import_module(name)
ready = time.monotonic()
importlib.import_module(request["package"] + ".fresh").answer(request, ready)
"""


def measure(
    make: str, arguments: dict, what: str, threads: int, device: str, transformers: bool = False
) -> float | None:
    """Seconds of the cold start or bytes of the peak (`what` "cold" or "memory"), None where they
    could not be had.

    make: "module:function" in this package; function(device=..., provider=..., **arguments) makes
    weights and inputs and returns `prepare`, which gets the provider ready and returns (call, a
    smaller call to warm up with, or None).
    """
    libraries = ["torch", *(["transformers"] if transformers else [])]
    if arguments["provider"].startswith("fasttx"):
        libraries.append("fasttx")
    request = {
        "make": make, "arguments": arguments, "what": what, "threads": threads, "device": device,
        "imports": libraries, "package": PACKAGE, "backend": providers.find()["fasttx"].BACKEND,
        "spawned": time.monotonic(),
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", _BOOT, json.dumps(request)],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=SOURCE_ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        return None
    return json.loads(done.stdout.splitlines()[-1])["value"]


def attention(case, direction: str, what: str, provider: str, threads: int, device: str):
    """`measure` for a case of attention."""
    arguments = {"case": asdict(case), "direction": direction, "provider": provider}
    return measure("ops.attention:fresh", arguments, what, threads, device)


def answer(request: dict, ready: float) -> None:
    """The fresh process's own part."""
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    providers.find()["fasttx"].BACKEND = request["backend"]
    module, function = request["make"].split(":")
    make = getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)
    prepare = make(device=device, **request["arguments"])
    start = time.monotonic()
    call, small = prepare()
    if request["what"] == "cold":
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        value = ready - request["spawned"] + time.monotonic() - start
    else:
        # A small case would leave torch.compile its work for the call that is measured.
        compiles = request["arguments"]["provider"] == "torch_compile"
        (call if compiles else small or call)()
        value = _growth(call, device)
    print(json.dumps({"value": value}))


def _growth(call: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _resident_growth(call)


def _resident_growth(call: Callable[[], object]) -> int:
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
