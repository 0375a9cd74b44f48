"""Loading fasttx/libfasttx.so, and the reasons when it cannot be had."""

import ctypes
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

LIBRARY = Path(__file__).with_name("libfasttx.so")
TORCH_MIN = (2, 11)

# Instruction-set levels, lowest first: the flags of /proc/cpuinfo each needs beyond the last's.
LEVELS = {
    "default": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512bf16": ("avx512_bf16",),
}

_lock = threading.Lock()
_loaded = False
_reason: str | None = None


def supported_levels() -> list[str]:
    """The instruction-set levels this CPU can run, lowest first."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ["default"]
    line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    levels = []
    for level, needed in LEVELS.items():
        if not flags.issuperset(needed):
            break
        levels.append(level)
    return levels


def check_cpu_isa() -> None:
    """Raise ValueError where FASTTX_CPU_ISA names no level, or one this CPU cannot run."""
    wanted = os.environ.get("FASTTX_CPU_ISA")
    if not wanted:
        return
    if wanted not in LEVELS:
        raise ValueError(
            f"FASTTX_CPU_ISA={wanted!r} is unknown; the levels are {', '.join(LEVELS)}"
        )
    if wanted not in (supported := supported_levels()):
        raise ValueError(
            f"FASTTX_CPU_ISA={wanted!r} is more than this CPU has; it runs {', '.join(supported)}"
        )


def load() -> None:
    """Load the native library into torch, once; RuntimeError where it cannot be had.

    Safe to call from several threads. FASTTX_CPU_ISA is read now: later changes have no effect.
    """
    if reason := unavailable():
        raise RuntimeError(f"fasttx's native library is not available: {reason}")


def unavailable() -> str | None:
    """Why the native library cannot be had, or None: then it is loaded.

    Raises ValueError for a FASTTX_CPU_ISA that cannot be honoured.
    """
    global _loaded, _reason
    if _loaded:
        return None
    if os.environ.get("FASTTX_NATIVE") == "0":
        return "FASTTX_NATIVE=0 is set"
    check_cpu_isa()
    with _lock:
        if not _loaded and _reason is None:
            _reason = _load()
            _loaded = _reason is None
    return _reason


def direct(name: str, alloc: Callable | None, **needs) -> Callable | None:
    """An op of the library as `function(args)`, without torch's dispatcher, at a third of its cost.

    It runs the op only where nothing but the kernel has to do with the call, and returns
    NotImplemented anywhere else: under a dispatch or function mode, a functorch transform, tracing
    or the profiler; for a tensor subclass or what else is not plain memory on the CPU; for a tensor
    that requires grad in grad mode; and where the kernel's needs (dtypes, dtype_of, sizes, absent,
    arguments by number) are not met. The outputs are alloc(*args), or made by the library; with
    None for alloc the op fills its arguments and has no others. None where the library or fasttx._C
    lacks the op.
    """
    if unavailable():
        return None
    try:
        from . import _C
    except ImportError:
        return None
    return _C.direct(name, alloc, **needs)


def cpu_isa() -> str | None:
    """The instruction-set level whose CPU kernels run, or None where the library cannot be had."""
    if unavailable():
        return None
    function = ctypes.CDLL(str(LIBRARY)).fasttx_cpu_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def has_cuda_kernels() -> bool:
    """Whether the library was built with the CUDA C++ kernels."""
    if unavailable():
        return False
    return hasattr(ctypes.CDLL(str(LIBRARY)), "fasttx_cuda_device_count")


def why_no_cuda_kernels() -> str:
    """The reason why a library that was built has none of them."""
    return (
        "libfasttx was built without the CUDA C++ kernels: that needs nvcc and a torch with CUDA, "
        "and FASTTX_CUDA not 0"
    )


def why_cuda_kernels_fail(device) -> str | None:
    """Why the CUDA C++ kernels that were built cannot run on this CUDA device, or None."""
    import torch

    with torch.cuda.device(device):
        status, text, built, driver = _probe_cuda()
    if not status:
        return None
    if driver < built:
        return (
            f"the NVIDIA driver is too old for the CUDA C++ kernels: it runs CUDA "
            f"{_version(driver)}, they were built with CUDA {_version(built)}"
        )
    return f"the CUDA C++ kernels cannot run on this card: {text}"


def _probe_cuda() -> tuple[int, str, int, int]:
    """(status, its text, CUDA of the build, CUDA of the driver), of the current device."""
    library = ctypes.CDLL(str(LIBRARY))
    built, driver = ctypes.c_int(), ctypes.c_int()
    status = library.fasttx_cuda_probe(ctypes.byref(built), ctypes.byref(driver))
    library.fasttx_cuda_error_text.restype = ctypes.c_char_p
    text = library.fasttx_cuda_error_text(status).decode()
    return status, text, built.value, driver.value


def _version(number: int) -> str:
    """13.0 of CUDA's 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _load() -> str | None:
    if not LIBRARY.is_file():
        return _why_not_built()
    import torch

    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH_MIN:
        return f"torch {torch.__version__} is too old: fasttx needs torch >= 2.11"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            f"it could not be loaded into torch {torch.__version__}: {str(error).splitlines()[0]}"
        )
    return None


def _why_not_built() -> str:
    try:
        why = json.loads(LIBRARY.with_name("_build.json").read_text())["no_native"]
    except (OSError, ValueError, KeyError):
        why = None
    if sys.platform != "linux":
        why = why or f"the native kernels are written for x86-64 Linux, this is {sys.platform}"
    if why:
        return f"fasttx was installed without it: {why}"
    return "not built: run `make build`, or `pip install --no-build-isolation --no-deps -e .`"
