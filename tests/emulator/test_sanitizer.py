"""The emulated kernels under AddressSanitizer: no access outside a tensor or the block's shared
memory. It must be preloaded, so the tests run once more in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .build import ROOT, compiler, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]
BEYOND = """
import torch
from tests.emulator.instructions import library, pointer
a, b = torch.randn(63, 32).bfloat16(), torch.randn(64, 32).bfloat16()
c, sums = torch.zeros({rows}, 64), torch.zeros(63)
library().emulator_gemm_mma(*map(pointer, (a, b, c, sums)), 63, 64, 32, 1, 0, 3)
"""


def sanitized(*command: str) -> subprocess.CompletedProcess:
    found = subprocess.run(
        [*compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True
    )
    asan = found.stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("the C++ compiler has no AddressSanitizer")
    env = {
        **os.environ,
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "FASTTX_EMULATOR_SANITIZE": "1",
    }
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=280
    )


def test_a_write_beyond_a_tensor_is_seen():
    """The planted bug writes one row too many, into a tensor that ends there."""
    assert sanitized("-c", BEYOND.format(rows=64)).returncode == 0
    done = sanitized("-c", BEYOND.format(rows=63))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
    assert "gemm_mma.cu" in done.stderr


def test_the_instructions_are_clean():
    done = sanitized(
        "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider",
        "tests/emulator/test_instructions.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
