"""softmax's CUDA kernels in the emulator: the cases of tests/ops against fp64; their traffic."""
# ruff: noqa: E501 (tables, one case a line)

import pytest
import torch

from fasttx.ops.softmax import softmax_bwd, softmax_fwd
from fasttx.testing import check
from tests.ops import test_softmax as ops
from tests.ops.test_softmax import CASES, Case, additive, holes

from .cases import named, selected
from .emulated import card, mode, traffic

CAUSAL = {"is_causal": "lower_right"}
MORE = [
    # Rows by eight: a warp's, a block's; widths at which another kernel begins.
    Case("8 columns", (5, 8), additive(5, 8)),
    Case("256 columns", (2, 3, 256), holes(3, 256), CAUSAL),
    Case("264 columns", (2, 3, 264), additive(2, 1, 264), CAUSAL, log=True),
    Case("512 columns", (5, 512), additive(512)),
    Case("776 columns", (3, 776), holes(3, 1)),
    Case("1024 columns", (2, 1024), additive(2, 1024).float(), keep=("mask",)),
    Case("1032 columns", (2, 1032), additive(1032), log=True),
    Case("16384 columns", (1, 16384)),
    Case("16392 columns", (1, 16392), additive(16392)),
    Case("fp32 mask, sliced", (3, 2, 64), additive(2, 64).float(), layouts={"mask": "sliced"}, keep=("mask",)),
    # Tiles of rows that lie side by side, one of them not full.
    Case("tile", (2, 21, 72), additive(21, 1), {"dim": 1, "scale": 0.5}),
    Case("tile, log, causal", (21, 72), holes(21, 72), {"dim": 0, "is_causal": True}, log=True),
    Case("tile, mask of every number", (2, 40, 8), additive(2, 40, 8), {"dim": 1}),
    Case("tile, more columns than shared memory has", (1600, 8), None, {"dim": 0}),
    # Sums for the mask over many parts.
    Case("many rows, a mask of numbers", (300, 24), additive(300, 1)),
    Case("many rows, one number", (900, 8), torch.ones(1, 1, dtype=torch.float64)),
]  # fmt: skip
QUICK = {"plain", "scale and float mask", "log, bool mask", "no rows", "no columns", "transposed"}
QUICK |= {"middle dimension", "strided", "lower right, S > T", "float mask of one number"}
QUICK |= {"256 columns", "264 columns", "1032 columns", "fp32 mask, sliced", "8 columns", "tile"}
QUICK |= {"tile, log, causal", "tile, mask of every number", "one number"}


@pytest.mark.parametrize(("dtype", "case"), list(selected(named([*CASES, *MORE]), QUICK)))
def test_against_fp64(dtype: torch.dtype, case: Case):
    with mode(seed=len(case.name) % 3):
        check(
            case.function("cuda"), case.function(None, compute=torch.float64),
            (case.function(None, compute=dtype), case.function("reference")), case.inputs(),
            dtype=dtype, wanted=case.wanted, keep=case.keep, layouts=case.layouts,
        )  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", [(3, 20), (3, 24), (24, 8)])
def test_hidden_and_missing_numbers(log, shape):
    """What is hidden is 0 (-inf) and reaches nothing; NaN that is visible fills its row."""
    dim = 0 if shape == (24, 8) else -1
    x = torch.randn(shape).bfloat16()
    rows = x if dim == -1 else x.t()
    visible = torch.rand(rows.shape) > 0.5
    visible[1], visible[:, 3] = False, True
    hidden = ~visible
    hidden[1] = True
    mask = (~hidden).t() if dim == 0 else ~hidden
    expected = None
    for junk in (0.0, torch.nan, torch.inf):
        rows.masked_fill_(hidden, junk)
        args = (x.t(), mask.t()) if dim == 0 else (x, mask)
        y = softmax_fwd(*args, 0.5, False, False, log, False, backend="cuda")
        assert (y[hidden] == (-torch.inf if log else 0)).all()
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        g = g.masked_fill(hidden, junk)
        dx, _ = softmax_bwd(g, y, *args, 0.5, False, False, log, 1, backend="cuda")
        assert (dx[hidden] == 0).all()
        expected = expected or (y, dx)
        assert torch.equal(y, expected[0]) and torch.equal(dx, expected[1])
    rows[2, 3] = torch.nan
    y = softmax_fwd(*args, 0.5, False, False, log, False, backend="cuda")
    assert y[2][~hidden[2]].isnan().all() and y[0].isnan().sum() == 0


@pytest.mark.parametrize("shape", [(6, 18), (6, 24), (6, 2000)])
def test_rows_of_minus_infinity_and_of_nan(shape):
    x = torch.randn(shape).bfloat16()
    x[1], x[2, 3], x[3, 4] = -torch.inf, torch.nan, torch.inf
    for log in (False, True):
        y = softmax_fwd(x, None, 1.0, False, False, log, False, backend="cuda")
        assert (y[1] == (-torch.inf if log else 0)).all() and y[2:4].isnan().all()
        assert y[[0, 4, 5]].isfinite().all()


def test_wide_results():
    """float32 from 16 bits, as under CUDA's autocast, and its backward."""
    for n in (40, 37, 2000):
        x, g = torch.randn(3, n).bfloat16(), torch.randn(3, n)
        m = torch.randn(1, n)
        args = (x, m, 0.7, False, False, False)
        y = softmax_fwd(*args, True, backend="cuda")
        assert y.dtype is torch.float32
        torch.testing.assert_close(y, softmax_fwd(*args, True, backend="reference"))
        ours, theirs = (softmax_bwd(g, y, *args, 3, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=8e-3)


@pytest.mark.parametrize("offset", range(8))
def test_a_row_may_begin_anywhere(offset):
    x = torch.randn(3, 60).bfloat16()[:, offset : offset + 45]
    for causal in (False, True):
        args = (x, None, 1.0, causal, False, False, False)
        ours, theirs = (softmax_fwd(*args, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(ours, theirs)
        g = torch.randn(3, 60).bfloat16()[:, offset : offset + 45]
        ours, theirs = (
            softmax_bwd(g, theirs, *args[:-1], 1, backend=b) for b in ("cuda", "reference")
        )
        torch.testing.assert_close(ours, theirs)


def test_into_its_own_input():
    for shape, dim in (((4, 24), -1), ((4, 21), -1), ((21, 16), 0)):
        x = torch.randn(shape).bfloat16()
        expected = ops.softmax(x, dim=dim, backend="cuda")
        assert torch.equal(ops.softmax(x, dim=dim, out=x, backend="cuda"), expected)
        assert torch.equal(x, expected)


def test_schedules_give_the_same_bits():
    x, m, g = torch.randn(40, 72).bfloat16(), torch.randn(72).bfloat16(), torch.randn(40, 72)
    results = []
    for eager, seed in ((False, 0), (True, 1), (False, 2)):
        found = []
        with mode(eager, seed):
            for t, mask, dim in ((x, m, -1), (x[:, 1:], m[1:], -1), (x, None, 0)):
                leaves = [t.clone().requires_grad_()]
                leaves += [] if mask is None else [mask.clone().requires_grad_()]
                y = ops.softmax(leaves[0], mask=[*leaves, None][1], dim=dim, backend="cuda")
                found += [y, *torch.autograd.grad(y, leaves, g[:, : t.shape[1]].bfloat16())]
        results.append(found)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


# Rows by a warp, by a block, at odd places, side by side.
@pytest.mark.parametrize(
    ("shape", "dim"), [((24, 768), -1), ((6, 2048), -1), ((20, 197), -1), ((96, 128), 0)]
)
def test_every_element_moves_once(shape, dim):
    x, g = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    moved = x.numel() * 2
    rest = (None, 0.5, False, False, False)
    x, g = x.movedim(dim, -1), g.movedim(dim, -1)
    traffic()
    y = softmax_fwd(x, *rest, False, backend="cuda")
    forward = traffic()
    softmax_bwd(g, y, x, *rest, 1, backend="cuda")
    backward = traffic()
    assert (forward.read, forward.written) == (moved, moved)
    assert (backward.read, backward.written) == (2 * moved, moved)
    if shape[-1] % 8 == 0:
        assert forward.narrow == backward.narrow == 0
    else:  # up to seven numbers at each end of a row
        assert max(forward.narrow, backward.narrow) <= 3 * shape[0] * 14 * 2


@pytest.mark.parametrize("n", [364, 372, 728, 760])
def test_tiles_keep_what_shared_memory_holds(n):
    """Of cards of which a block may have 99 KiB; a tile of more columns is read twice."""
    x, g = torch.randn(n, 8).bfloat16(), torch.randn(n, 8).bfloat16()
    args = (x.t(), None, 1.0, False, False, False)
    with card(80):
        y = softmax_fwd(*args, False, backend="cuda")
        dx, _ = softmax_bwd(g.t(), y, *args, 1, backend="cuda")
    torch.testing.assert_close(y, softmax_fwd(*args, False, backend="reference"))
    expected, _ = softmax_bwd(g.t(), y, *args, 1, backend="reference")
    torch.testing.assert_close(dx, expected, atol=1e-4, rtol=1e-2)


def test_what_is_hidden_by_causal_is_not_read():
    x = torch.randn(64, 512).bfloat16()
    traffic()
    softmax_fwd(x, None, 1.0, True, False, False, False, backend="cuda")
    assert traffic().read < x[:, :72].numel() * 2
