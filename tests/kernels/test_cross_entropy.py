"""The Triton kernels of both cross-entropies on GPUs that are not there: no spills, they fit.

Their numbers are checked with the op's (tests/ops/test_*cross_entropy.py), under the interpreter.
"""

import json
import os
import subprocess
import sys

import pytest
from fasttx.kernels.compile_check import TARGETS

KERNELS = {"_norm", "_forward", "_reduce", "_backward", "_rescale", "_block_slope"}


@pytest.mark.slow
def test_compiles_ahead_of_time():
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cross_entropy_compile"],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == set(TARGETS)
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared"] <= row["limit"], row
        assert row["registers"] <= 128, row
