"""No GPU is needed: Triton kernels run under its interpreter, which must be chosen before triton is
imported."""

import os
import tempfile

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


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
