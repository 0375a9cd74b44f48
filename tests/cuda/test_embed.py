"""embed's CUDA kernels in the emulator: the cases of tests/ops against fp64; their traffic."""
# ruff: noqa: E501 (tables, one case a line)

import pytest
import torch

from fasttx.ops.embed import embed, embed_bwd, embed_fwd
from fasttx.testing import check
from tests.ops import test_embed as ops
from tests.ops.test_embed import BERT, CASES, DROP, NAMES, RMS, Case

from .cases import named, selected
from .emulated import mode, traffic

# Rows by eight, at the widths at which another kernel begins.
WIDTHS = {8: 9, 256: 5, 264: 5, 512: 3, 768: 6, 1024: 3, 1032: 3, 4096: 2, 4104: 2, 16384: 1, 16392: 1}  # fmt: skip
MORE = [
    Case(f"{n} columns", (rows, 2), n, options={**DROP, **(RMS if i % 2 else BERT)})
    for i, (n, rows) in enumerate(WIDTHS.items())
]
MORE += [
    Case("by eight, no norm", (5, 9), 72, NAMES[:3], {"scale": 0.5}),
    Case("by eight, positions by ids", (5, 40), 24, options={"positions": "padding", "padding_idx": 1}),
    Case("by eight, one segment", (3, 35), 16, segments=False, options=DROP),
    Case("by eight, fp32 positions", (3, 7), 40, keep=("position_weight",), options=DROP),
    Case("by eight, transposed gradient", (3, 7), 40, layouts={"dout": "transposed", "token_weight": "sliced"}),
    Case("many rows, by eight", (31, 40), 64, NAMES[:3]),
]  # fmt: skip
QUICK = {
    "BERT",
    "RoBERTa",
    "rms",
    "no columns",
    "no tokens",
    "strided",
    "strided, no norm",
    "one id",
}
QUICK |= {"8 columns", "264 columns", "768 columns", "many rows", "many rows, by eight"}
QUICK |= {c.name for c in MORE if c.name.startswith("by eight")}


@pytest.mark.parametrize(("dtype", "case"), list(selected(named([*CASES, *MORE]), QUICK)))
def test_against_fp64(dtype: torch.dtype, case: Case):
    with mode(seed=len(case.name) % 3):
        check(
            case.function("cuda"), case.plain, case.plain, case.inputs(), dtype=dtype,
            wanted=case.given, keep=case.keep, layouts=case.layouts,
        )  # fmt: skip


@pytest.mark.parametrize("N", [37, 40])
def test_follows_the_other_backends(N):
    """Statistics, and gradients from the reference's statistics."""
    case = Case("", N=N)
    for norm in (0, 1, 2):
        w, ids, place = ops._inner(case, norm)
        w = [t.bfloat16() for t in w[:3]] + w[3:]
        ours, theirs = (
            embed_fwd(*w, *ids, *place, 1.5, 1e-5, 0.2, False, backend=b)
            for b in ("cuda", "reference")
        )
        torch.testing.assert_close(ours, theirs, atol=4e-2, rtol=1e-2)
        torch.testing.assert_close(ours[1], theirs[1])
        g = torch.randn(3, 7, N).bfloat16()
        need = 31 if norm else 7
        rest = (*ids, *place, 1.5, 0.2, need)
        ours, theirs = (
            embed_bwd(*w, theirs[1], g, *rest, backend=b) for b in ("cuda", "reference")
        )
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("need", [1, 2, 4, 8, 16, 24, 17])
def test_subsets_of_gradients(need):
    case = Case("", N=40)
    w, ids, place = ops._inner(case, 1)
    w = [t.bfloat16() for t in w]
    stats = embed_fwd(*w, *ids, *place, 1.0, 1e-5, 0.0, False, backend="cuda")[1]
    g = torch.randn(3, 7, 40).bfloat16()
    whole, some = (
        embed_bwd(*w, stats, g, *ids, *place, 1.0, 0.0, n, backend="cuda") for n in (31, need)
    )
    for bit, (got, want) in enumerate(zip(some, whole, strict=True)):
        assert torch.equal(got, want) if need >> bit & 1 else got.numel() == 0


@pytest.mark.parametrize("runs", [[1], [31], [32], [33], [64], [65, 1, 30, 97], [1] * 70, [5, 200]])
@pytest.mark.parametrize("N", [16, 13])
def test_runs_of_every_length(runs, N):
    """Of ids that begin and end anywhere in the 32 that a warp sums; absent rows between are 0."""
    ids = torch.cat([torch.full((n,), 3 * i + 1) for i, n in enumerate(runs)])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))]
    w = torch.zeros(3 * len(runs) + 40, N).bfloat16()
    g = torch.randn(1, len(ids), N).bfloat16()
    empty = torch.empty(0, len(ids))
    rest = (empty, g, ids[None], None, None, None, 0, 4, -1, 0, 0.5, 0.0, 1)
    ours, theirs = (
        embed_bwd(w, None, None, None, None, *rest, backend=b)[0] for b in ("cuda", "reference")
    )
    torch.testing.assert_close(ours, theirs, atol=3e-2, rtol=1e-2)
    exact = torch.zeros(w.shape, dtype=torch.float64).index_add(0, ids, 0.5 * g[0].double())
    exact[4] = 0
    torch.testing.assert_close(ours, exact.bfloat16(), atol=2e-3, rtol=8e-3)
    assert not ours[[i for i in range(len(w)) if i not in ids or i == 4]].any()


def test_unknown_ids():
    """An id out of range makes its row NaN, and no access out of bounds; it has no gradient."""
    for N in (16, 13):
        w = torch.randn(5, N).bfloat16()
        ids = torch.tensor([[0, -1, 4, 5, 10**12]])
        tables = (w, None, None, None, None)
        places = (0, -1, -1, 0)
        out, stats = embed_fwd(
            *tables, ids, None, None, None, *places, 1.0, 1e-5, 0.0, False, backend="cuda"
        )
        assert out[0].isnan().all(1).tolist() == [False, True, False, True, True]
        g = torch.randn(1, 5, N).bfloat16()
        rest = (stats, g, ids, None, None, None, *places, 1.0, 0.0, 1)
        (dw, *_) = embed_bwd(*tables, *rest, backend="cuda")
        assert torch.equal(dw[[0, 4]], g[0, [0, 2]]) and not dw[1:4].any()


def test_schedules_give_the_same_bits():
    results = []
    case = Case("", (9, 30), 40, options={**DROP, "positions": "padding", "padding_idx": 1})
    for eager, seed in ((False, 0), (True, 1), (False, 2)):
        leaves = {n: t.bfloat16().requires_grad_() for n, t in case.inputs().items()}
        with mode(eager, seed):
            out = case.function("cuda")(**leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("N", [256, 768, 2048])
def test_every_element_moves_once(N):
    """A row of each table is read once, the result written once; gradients are written once."""
    B, S, V = 2, 64, 100
    ids = torch.randint(0, V, (B, S))
    w, p = torch.randn(V, N).bfloat16(), torch.randn(S + 8, N).bfloat16()
    tables, rest = (w, p, None, None, None), (ids, None, None, None, 0, -1, -1)
    rows, row = B * S, N * 2
    traffic()
    out, _ = embed_fwd(*tables, *rest, 0, 1.0, 1e-5, 0.0, False, backend="cuda")
    seen = traffic()
    assert seen.written == rows * row
    by = 32 if N <= 1024 else 256  # threads of a row, which all read its id
    assert 2 * rows * row <= seen.read <= 2 * rows * row + rows * by * 8
    embed_bwd(*tables, torch.empty(0, rows), out, *rest, 0, 1.0, 0.0, 3, backend="cuda")
    seen = traffic()
    # Beside the gradients: sums of runs that go on in the next 32 ids, keys and their order.
    beside = (rows // 32) * 2 * N * 4 + rows * 16
    assert (V + S + 8) * row <= seen.written <= (V + S + 8) * row + beside
    assert 2 * rows * row <= seen.read <= 2 * rows * row + beside + 5000 * (N // 256) + V * 40


def test_sinusoidal_positions_are_a_table():
    w = torch.randn(20, 32).bfloat16()
    table = ops.sinusoidal_positions(40, 32, dtype=torch.bfloat16)
    ids = torch.randint(0, 20, (2, 9))
    ours, theirs = (
        embed(ids, w, table, scale=32**0.5, position_offset=3, backend=b)
        for b in ("cuda", "reference")
    )
    torch.testing.assert_close(ours, theirs)
