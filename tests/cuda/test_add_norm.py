"""add_norm's CUDA kernels in the emulator: the cases of tests/ops against fp64; their traffic."""

import dataclasses

import pytest
import torch

from fasttx.ops.add_norm import add_norm_bwd, add_norm_fwd
from fasttx.testing import check
from tests.ops.test_add_norm import CASES, DROP, NAMES, Case

from .cases import named, selected
from .emulated import mode, traffic

# Widths at which another kernel begins, and the widths of rows that lie by eight.
ROWS = {
    8: 9,
    256: 5,
    264: 5,
    512: 3,
    768: 6,
    1024: 3,
    1032: 3,
    4096: 2,
    4104: 2,
    16384: 1,
    16392: 1,
}
WIDTHS = [
    Case(
        f"{n} columns", (rows, n), NAMES, {**DROP, "prenorm": True, "kind": ("layer", "rms")[i % 2]}
    )
    for i, (n, rows) in enumerate(ROWS.items())
]
MANY = Case("many parts", (700, 64), NAMES, {"prenorm": True})
WIDE_RESIDUAL = Case("by eight, fp32 residual", (5, 64), NAMES, DROP, keep=("residual", "bias"))
QUICK = {"residual", "everything", "everything rms", "no rows", "transposed", "one vector"}
QUICK |= {"768 columns", "264 columns", "256 columns", "by eight, fp32 residual"}
HERE = [*(c for c in CASES if "x" not in c.keep), *WIDTHS, MANY, WIDE_RESIDUAL]


@pytest.mark.parametrize(("dtype", "case"), list(selected(named(HERE), QUICK)))
def test_against_fp64(dtype: torch.dtype, case: Case):
    with mode(seed=len(case.name) % 3):
        check(
            case.function("cuda"), case.function(None, compute=torch.float64),
            case.function(None, compute=dtype), case.inputs(), dtype=dtype, wanted=case.given,
            names=case.names, keep=case.keep, layouts=case.layouts,
        )  # fmt: skip


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_follows_the_other_backends(rms):
    """Statistics and gradients are the CPU kernels', of rows by eight and of odd ones."""
    for n in (48, 37):
        x, r, g, t = (torch.randn(6, n).bfloat16() for _ in range(4))
        w, seed = torch.randn(n), torch.tensor([9])
        forward = (x, r, w, w, w, seed, 1e-5, 0.2, rms, True, False)
        ours, theirs = (add_norm_fwd(*forward, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(ours, theirs, atol=4e-2, rtol=1e-2)
        torch.testing.assert_close(ours[2], theirs[2])
        backward = (x, theirs[2], g, t, r, w, w, w, seed, 0.2, rms, 31)
        ours, theirs = (add_norm_bwd(*backward, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(ours, theirs, atol=4e-2, rtol=1e-2)


@pytest.mark.parametrize("need", [1, 2, 4, 24, 17])
def test_subsets_of_gradients(need):
    x, r, g = (torch.randn(5, 40).bfloat16() for _ in range(3))
    w = torch.randn(40)
    stats = add_norm_fwd(x, r, w, w, w, None, 1e-5, 0.0, False, False, False, backend="cuda")[2]
    rest = (x, stats, g, None, r, w, w, w, None, 0.0, False)
    whole = add_norm_bwd(*rest, 31, backend="cuda")
    for bit, (got, want) in enumerate(
        zip(add_norm_bwd(*rest, need, backend="cuda"), whole, strict=True)
    ):
        assert torch.equal(got, want) if need >> bit & 1 else got.numel() == 0


def test_schedules_give_the_same_bits():
    case = dataclasses.replace(WIDTHS[2], shape=(40, 264))
    results = []
    for eager, seed in ((False, 0), (True, 1), (False, 2)):
        inputs = {n: t.bfloat16().requires_grad_() for n, t in case.inputs().items()}
        with mode(eager, seed):
            out, total = case.function("cuda")(**inputs)
            grads = torch.autograd.grad((out * 2 + total).sum(), list(inputs.values()))
        results.append([out, total, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("n", [768, 2048])
def test_every_element_moves_once(n):
    """By 16 bytes, but for the statistics; parameters and partial sums are beside the rows."""
    rows, element = 40, 2
    x, r, g, t = (torch.randn(rows, n).bfloat16() for _ in range(4))
    w = torch.randn(n).bfloat16()
    traffic()
    stats = add_norm_fwd(x, r, w, w, None, None, 1e-5, 0.0, False, True, False, backend="cuda")[2]
    seen = traffic()
    assert seen.written == 2 * rows * n * element + rows * 8
    assert seen.read == (2 + 2) * rows * n * element  # x, residual; weight and bias from the cache
    assert seen.narrow == rows * 8
    add_norm_bwd(x, stats, g, t, r, w, None, None, None, 0.0, False, 3, backend="cuda")
    seen = traffic()
    assert seen.written == 2 * rows * n * element
    assert seen.read <= (4 + 1) * rows * n * element + rows * 8 * n // 8
