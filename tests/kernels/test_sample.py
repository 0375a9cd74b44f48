"""The Triton kernel of sample: rows longer than a block under the interpreter, and compiled for
GPUs that are not there."""

import pytest
import torch

from fasttx.ops.sample import sample

from .ahead import compiled


def test_rows_longer_than_a_block():
    x = torch.randn(2, 700)
    for options in ({}, {"top_k": 20, "top_p": 0.9}, {"temperature": 0}):
        got = sample(x, **options, seed=4, backend="triton")
        assert torch.equal(got, sample(x, **options, seed=4, backend="reference"))


@pytest.mark.slow
def test_compiles_for_every_target():
    """No spills, shared memory within the limit."""
    assert compiled("sample")
