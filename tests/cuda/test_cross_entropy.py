"""cross_entropy's CUDA kernels in the emulator: the cases of tests/ops against fp64; their
traffic."""

import pytest
import torch

from fasttx.ops.cross_entropy import cross_entropy_bwd, cross_entropy_fwd, cross_entropy_inplace
from tests.ops.test_cross_entropy import CASES, problem
from tests.ops.test_cross_entropy import test_against_fp64 as against_fp64

from .cases import selected
from .emulated import mode, traffic

QUICK = {"plain", "one class", "no row", "weight, everything", "weight, mean, everything"}
QUICK |= {"blocks and a tail", "strided", "expanded", "large logits", "ignore a class"}


@pytest.mark.parametrize(("dtype", "name"), list(selected(((n, n) for n in CASES), QUICK)))
def test_against_fp64(dtype, name):
    with mode(seed=len(name) % 3):
        against_fp64("cuda", dtype, name)


@pytest.mark.parametrize("offset", range(8))
def test_a_row_may_begin_anywhere(offset):
    """Vectors start at the row's first aligned 16 bytes, wherever that is."""
    wide = torch.randn(3, 60).bfloat16()
    x = wide[:, offset : offset + 45][None]
    target = torch.tensor([44, 0, 7])
    rest = (target, None, -100, 1, 0.1, 0.0)
    ours, theirs = (cross_entropy_fwd(x, *rest, backend=b) for b in ("cuda", "reference"))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)
    up = torch.tensor(1.0)
    rest = (up, x, target, None, *theirs[1:], -100, 1, 0.1, 0.0)
    ours, theirs = (cross_entropy_bwd(*rest, backend=b) for b in ("cuda", "reference"))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("target", [-5, 45])
def test_a_target_out_of_range_gives_nan(target):
    x = torch.randn(1, 2, 45).bfloat16()
    targets = torch.tensor([target, 3])
    loss, *residuals = cross_entropy_fwd(x, targets, None, -100, 0, 0.0, 0.0, backend="cuda")
    assert loss[0].isnan() and loss[1].isfinite()
    rest = (torch.ones(2), x, targets, None, *residuals, -100, 0, 0.0, 0.0)
    dx = cross_entropy_bwd(*rest, backend="cuda")[0]
    assert dx[0].isnan().all() and dx[1].isfinite().all()


def test_hidden_and_missing_classes():
    """-inf is a class that cannot be; NaN that is visible reaches the loss of its row alone."""
    x = torch.randn(1, 3, 70).bfloat16()
    x[0, 0, ::2], x[0, 1, 5] = -torch.inf, torch.nan
    rest = (torch.tensor([1, 2, 3]), None, -100, 0, 0.0, 0.0)
    ours, theirs = (cross_entropy_fwd(x, *rest, backend=b)[0] for b in ("cuda", "reference"))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isnan().tolist() == [False, True, False]


def test_every_element_moves_once():
    """The forward reads the logits once, the backward reads and writes them once, the gradient in
    place reads them twice."""
    rows, V = 6, 4096
    logits, target = problem((rows,), V, ignored=0)
    x = logits.bfloat16()[None]
    beside = rows * 128 * 20  # the target and the statistics, by every thread of a row
    traffic()
    _, *residuals = cross_entropy_fwd(x, target, None, -100, 1, 0.0, 0.0, backend="cuda")
    seen = traffic()
    assert rows * V * 2 <= seen.read <= rows * V * 2 + beside and seen.written <= beside
    rest = (torch.tensor(1.0), x, target, None, *residuals, -100, 1, 0.0, 0.0)
    cross_entropy_bwd(*rest, backend="cuda")
    seen = traffic()
    assert rows * V * 2 <= seen.read <= rows * V * 2 + beside
    assert seen.written == rows * V * 2
    cross_entropy_inplace(x, target, None, -100, 1, 0.0, 0.0, backend="cuda")
    seen = traffic()
    assert seen.read <= 2 * rows * V * 2 + beside and seen.written <= rows * V * 2 + beside
