"""The rope kernel compiled for GPUs that are not there; several tiles and groups of heads under
the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fasttx.kernels import rope as kernels
from fasttx.kernels.compile_check import TARGETS

from fasttx.reference.rope import rope_math

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("interleaved", [False, True])
def test_several_tiles(interleaved, monkeypatch):
    """Tiles that end within the rows, groups that end within the heads."""
    q, k, cos, sin = (
        torch.randn(*n) for n in ((2, 5, 11, 8), (2, 7, 11, 8), (2, 11, 6), (2, 11, 6))
    )
    outputs = [torch.full_like(t, torch.nan) for t in (q, k)]
    monkeypatch.setattr(kernels, "ELEMENTS", 16)
    (call,) = kernels.rope_calls("sm90", *outputs, q, k, cos, sin, 6, interleaved, False)
    assert call.features.BLOCK_S == 4
    call.run()
    for out, x in zip(outputs, (q, k), strict=True):
        torch.testing.assert_close(out, rope_math(x, cos, sin, 6, interleaved))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiles_without_spills():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.rope_compile"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == set(TARGETS)
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= row["limit"], row
