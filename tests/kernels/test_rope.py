"""The rope kernel compiled for GPUs that are not there; several tiles and groups of heads under
the interpreter."""

import pytest
import torch
from fasttx.kernels import rope as kernels

from fasttx.reference.rope import rope_math

from .ahead import compiled


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
    assert compiled("rope")
