"""No GPU is needed: Triton kernels run under its interpreter, which must be chosen before triton is
imported. FASTTX_TEST_DEVICE=cuda runs the inner ops of every test on a GPU instead: choose the
tests of one backend with -k triton or -k cuda."""

import contextlib
import os
import sysconfig
import tempfile
from pathlib import Path

os.environ.setdefault("FASTTX_TEST_DEVICE", "cpu")
os.environ.setdefault("TRITON_INTERPRET", str(int(os.environ["FASTTX_TEST_DEVICE"] == "cpu")))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Compiled graphs of one run must never serve another: inductor's cache does not key on a Python
# backward.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="fasttx-inductor-"))
# What somebody measured on this machine must not choose kernels here.
os.environ["FASTTX_CACHE"] = tempfile.mkdtemp(prefix="fasttx-cache-")

import pytest
import torch

from fasttx.op import OPS
from fasttx.testing import on_device

TEST_DEVICE = os.environ["FASTTX_TEST_DEVICE"]


def unusable(op: str, backend: str) -> str | None:
    """The contract's own reason why a backend has no kernel of an op here."""
    reasons = [k.unavailable() for k in OPS[op].tables[TEST_DEVICE] if k.backend == backend]
    return (
        next((r for r in reasons if r), None)
        if reasons
        else f"{op} has no {backend} kernel for {TEST_DEVICE} tensors"
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


@pytest.fixture(autouse=True, scope="session")
def _elsewhere():
    with on_device(TEST_DEVICE) if TEST_DEVICE != "cpu" else contextlib.nullcontext():
        yield
