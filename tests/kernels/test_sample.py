"""The Triton kernel of sample: rows longer than a block under the interpreter, and compiled for
GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fasttx.kernels.compile_check import TARGETS

from fasttx.ops.sample import sample


def test_rows_longer_than_a_block():
    x = torch.randn(2, 700)
    for options in ({}, {"top_k": 20, "top_p": 0.9}, {"temperature": 0}):
        got = sample(x, **options, seed=4, backend="triton")
        assert torch.equal(got, sample(x, **options, seed=4, backend="reference"))


@pytest.mark.slow
def test_compiles_for_every_target():
    """No spills, shared memory within the limit."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sample_compile"],
        env=dict(os.environ, TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1"),
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {row["arch"] for row in rows} == set(TARGETS)
    faults = [row for row in rows if row["spills"] or row["shared"] > row["limit"]]
    assert not faults, faults
