"""The Triton kernel of attention_map, compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fasttx.kernels.compile_check import TARGETS


@pytest.mark.slow
def test_compiles_for_every_target():
    """No spills, shared memory within the limit."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.attention_map_compile"],
        env=dict(os.environ, TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1"),
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for arch in TARGETS:
        assert "attention_map_kernel" in {row["kernel"] for row in rows if row["arch"] == arch}
    faults = [row for row in rows if row["spills"] or row["shared"] > row["limit"]]
    assert not faults, faults
