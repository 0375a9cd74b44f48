"""No GPU is needed: Triton kernels run under its interpreter, which must be chosen before triton is
imported."""

import os
import sysconfig
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Compiled graphs of one run must never serve another: inductor's cache does not key on a Python
# backward.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="fasttx-inductor-"))

import pytest
import torch

from fasttx.op import OPS


def unusable(op: str, backend: str) -> str | None:
    """The contract's own reason why a backend has no kernel of an op here."""
    reasons = [k.unavailable() for k in OPS[op].tables["cpu"] if k.backend == backend]
    return (
        next((r for r in reasons if r), None)
        if reasons
        else f"{op} has no {backend} kernel for CPU tensors"
    )


def pytest_runtest_setup(item):
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if item.get_closest_marker("headers") and not headers.is_file():
        pytest.skip("Python.h is not installed (Debian: python3-dev)")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
