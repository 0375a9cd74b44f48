"""The Triton kernels of both cross-entropies on GPUs that are not there: no spills, they fit.

Their numbers are checked with the op's (tests/ops/test_*cross_entropy.py), under the interpreter.
"""

import pytest

from .ahead import compiled

KERNELS = {"_norm", "_forward", "_reduce", "_backward", "_rescale", "_block_slope"}


@pytest.mark.slow
def test_compiles_ahead_of_time():
    rows = compiled("cross_entropy")
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["registers"] <= 128, row
