"""linear's CUDA kernels in the emulator, on both kinds of card: against fp64, in every schedule,
with planted bugs; their traffic."""
# ruff: noqa: E501 (tables, one case a line)

import pytest
import torch
import torch.nn.functional as F

import fasttx
from fasttx.ops.linear import ACTIVATIONS, linear_bwd, linear_fwd
from fasttx.testing import check, guarded_outputs
from tests.ops.test_linear import NAMES, TURNED, Case

from .emulated import mode, traffic
from .gemm_kernels import KERNELS, gemm_kernel, selected
from .planted import Bug, Planted

pytestmark = pytest.mark.filterwarnings("ignore:fasttx.linear runs on the plain")
TAKEN = {"residual": "transposed", "dout": "strided", "bias": "strided"}
CASES = [
    Case("one tile", (5, 3), 40, 24, "gelu"),
    Case("tails of tiles", (130,), 72, 200, "silu", layouts=TURNED),
    Case("many tiles", (400,), 200, 264, "gelu_tanh"),
    Case("a ring of stages", (140,), 1104, 136, "relu"),
    Case("plain", (70,), 64, 136, given=NAMES[:2]),
    Case("plain, transposed weight", (70,), 64, 136, given=NAMES[:2], layouts=TURNED),
    Case("odd columns", (40,), 24, 131, "gelu"),
    Case("odd columns, no activation", (40,), 24, 131, given=NAMES[:3]),
    Case("sums over many rows", (1100,), 24, 40, given=NAMES[:3]),
    Case("any strides", (30, 5), 24, 40, "gelu", layouts=TAKEN),
    Case("expanded", (40,), 24, 40, "relu", layouts={"dout": "expanded"}),
    Case("one row", (), 48, 40, "gelu"),
    Case("one column", (9,), 48, 1, "gelu"),
    Case("no rows", (0, 3), 16, 8, "gelu"),
]
QUICK = {"one tile", "tails of tiles", "plain, transposed weight", "odd columns, no activation"}
QUICK |= {"sums over many rows", "any strides", "one column", "no rows"}


@pytest.mark.parametrize(("dtype", "kernel", "case"), list(selected(CASES, QUICK, "sm90")))
def test_against_fp64(dtype: torch.dtype, kernel: str, case: Case):
    with gemm_kernel(kernel), mode(len(case.name) % 2 == 1, len(case.name) % 3):
        check(
            case.function("cuda"), case.function(None, compute=torch.float64),
            case.function(None, compute=dtype), case.inputs(), dtype=dtype, wanted=case.given,
            layouts=case.layouts,
        )  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("K", [1, 7, 33, 70, 129])
def test_any_number_of_inputs(kernel, K):
    """Rows longer than K, of any K: what follows in a row is NaN and never read."""
    whole = (K + 7) // 8 * 8 + 8
    x, w = (torch.full((n, whole), torch.nan).bfloat16() for n in (20, 24))
    x[:, :K], w[:, :K] = torch.randn(20, K), torch.randn(24, K)
    leaves = [t[:, :K].detach().requires_grad_() for t in (x, w)]
    g = torch.randn(20, 24).bfloat16()
    with gemm_kernel(kernel):
        out = fasttx.linear(*leaves, backend="cuda")
        got = [out, *torch.autograd.grad(out, leaves, g)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.linear(*wide)
    expected = [expected, *torch.autograd.grad(expected, wide, g.double())]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 2**-8 * b.abs().max()


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_activation_everywhere(activation):
    """Values and slopes, tails included, within their rounding to fp16 and a few of fp32."""
    x = torch.linspace(-12, 12, 1501).half()[:, None] * torch.eye(1, 8).half()
    one = torch.eye(1, 8).half()
    leaf = x.clone().requires_grad_()
    got = fasttx.linear(leaf, one, activation=activation, backend="cuda")
    slope = torch.autograd.grad(got.sum(), leaf)[0]
    wide = x.double().requires_grad_()
    want = fasttx.linear(wide, one.double(), activation=activation)
    expected = torch.autograd.grad(want.sum(), wide)[0]
    for a, b in ((got, want), (slope, expected)):
        assert ((a - b).abs() <= 2**-11 * b.abs() + 1.01 * 2**-25 + 1e-6 * b.abs()).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_schedules_give_the_same_bits(kernel):
    """Four tiles to three multiprocessors, so that a block has two; sums in parts."""
    tensors = torch.randn(1100, 136), torch.randn(72, 136) / 12, torch.randn(72)
    g, results = torch.randn(1100, 72).bfloat16(), []
    for eager, seed in ((False, 0), (True, 1), (False, 2)):
        leaves = [t.bfloat16().requires_grad_() for t in tensors]
        with gemm_kernel(kernel), mode(eager, seed):
            out = fasttx.linear(*leaves, activation="gelu", backend="cuda")
            results.append([out, *torch.autograd.grad(out, leaves, g)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_follows_the_other_backends(kernel):
    x, w, b, g = (torch.randn(s).bfloat16() for s in ((7, 24), (16, 24), (16,), (7, 16)))
    pre = linear_fwd(x, w, b, None, 1, True, backend="reference")[1]
    with gemm_kernel(kernel):
        ours = linear_fwd(x, w, b, None, 1, True, backend="cuda")[1]
        torch.testing.assert_close(ours, pre, atol=2e-2, rtol=1e-2)
        whole = linear_bwd(x, w, pre, g, 1, 7, backend="cuda")
        theirs = linear_bwd(x, w, pre, g, 1, 7, backend="reference")
        torch.testing.assert_close(whole, theirs, atol=4e-2, rtol=1e-2)
        for need in range(1, 7):
            parts = linear_bwd(x, w, pre, g, 1, need, backend="cuda")
            for bit, (got, want) in enumerate(zip(parts, whole, strict=True)):
                assert torch.equal(got, want) if need >> bit & 1 else got.numel() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_stays_in_its_row(kernel):
    x, w = torch.randn(40, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    x[2, 7] = torch.nan
    with gemm_kernel(kernel):
        out = fasttx.linear(x, w, activation="relu", backend="cuda")
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 39]].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("turned", [False, True], ids=["", "transposed weight"])
def test_traffic(kernel, turned):
    """A tile reads its operands once and writes by 16 bytes; no two rows of a matrix that ldmatrix
    reads meet on a bank."""
    x, w = torch.randn(256, 128).bfloat16(), torch.randn(128, 128).bfloat16()
    w = w.t().contiguous().t() if turned else w
    with gemm_kernel(kernel):
        traffic()
        out, _ = linear_fwd(x, w, None, None, 0, False, backend="cuda")
        seen = traffic()
        assert seen.read == (x.numel() + 2 * w.numel()) * 2
        assert (seen.written, seen.narrow) == (out.numel() * 2, 0)
        linear_bwd(x, w, None, out, 0, 3, backend="cuda")
        assert traffic().narrow == 0
        assert seen.shared_conflicts == 0 == traffic().shared_conflicts


def test_wide_tiles_read_a_quarter_less():
    x, w = torch.randn(256, 64).bfloat16(), torch.randn(512, 64).bfloat16()
    read = []
    for kernel in ("sm90", "sm90 wide"):
        with gemm_kernel(kernel):
            traffic()
            linear_fwd(x, w, None, None, 0, False, backend="cuda")
            read.append(traffic().read)
    assert read[1] == 0.75 * read[0]


def test_the_bias_gradient_reads_each_element_once():
    """And what it has summed of 256 rows in 32 parts."""
    pre, g = (torch.randn(256, 512).bfloat16() for _ in range(2))
    x, w = torch.randn(256, 16).bfloat16(), torch.randn(512, 16).bfloat16()
    traffic()
    linear_bwd(x, w, pre, g, 1, 4, backend="cuda")
    seen, partials = traffic(), 32 * 512 * 4
    assert seen.read == 2 * pre.numel() * 2 + partials
    assert (seen.written, seen.narrow) == (partials + 512 * 2, partials)


REFUSED = {
    "rows apart": ((torch.randn(4, 33), torch.randn(8, 33)), "x of contiguous rows that begin"),
    "columns": ((torch.randn(64, 4).t(), torch.randn(8, 64)), "x of contiguous rows that begin"),
    "weight": ((torch.randn(4, 32), torch.randn(8, 64)[:, ::2]), "weight of contiguous rows or"),
    "begin": ((torch.randn(4, 40)[:, 1:33], torch.randn(8, 32)), "x aligned to 16 bytes"),
    "empty": ((torch.randn(4, 0), torch.randn(8, 0)), r"1 <= x.shape\[1\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_16_byte_copies_cannot_read_is_refused(name):
    (x, w), reason = REFUSED[name]
    x, w = (t.to(torch.bfloat16) if name == "empty" else _bf16(t) for t in (x, w))
    with pytest.raises(NotImplementedError, match=f"cuda: needs {reason}"):
        fasttx.linear(x, w, backend="cuda")
    shown = fasttx.explain(fasttx.linear, x, w)
    assert any(b == "cuda" and f"needs {reason[:12]}" in why for _, b, why, _ in shown.rows)


def _bf16(t):
    """bf16 with t's strides and offset."""
    base = torch.randn(t.untyped_storage().nbytes() // 4).bfloat16()
    return base.as_strided(t.shape, t.stride(), t.storage_offset())


SM80, SM90, EPILOGUE = "cuda/sm80/gemm.h", "cuda/sm90/gemm.h", "cuda/tile/gemm_epilogue.h"
FULL, EMPTY = (
    "mbarrier_wait(S::full(bars, s), at / S::STAGES & 1);",
    "mbarrier_wait(S::empty(bars, s), (at / S::STAGES & 1) ^ 1);",
)
EXPECT = "mbarrier_arrive_expect(S::full(bars, s), S::STAGE);"
INNER = "from.transposed ? from.outer : g.K"
BUGS = [
    ("sm80", Bug("no wait for copies", SM80, "cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES>();")),
    ("sm80", Bug("no barrier", SM80, "__syncthreads();\n    bring(step + STAGES - 1);", "bring(step + STAGES - 1);")),
    ("sm80", Bug("a number too many", SM80, "K - k0 - k", "K + 1 - k0 - k")),
    ("sm80", Bug("another order of banks", SM80, "k + lane / 8 % 2 * 8", "(k + lane / 8 % 2 * 8) ^ 8")),
    ("sm80", Bug("a column too many", EPILOGUE, "min(8, g.N - n)", "min(8, g.N + 1 - n)")),
    ("sm80", Bug("bias of the column before", EPILOGUE, "load_panel(bias, dtype_of<T>, 0, n, live, more);", "load_panel(bias, dtype_of<T>, 0, n - 1, live, more);")),
    ("sm90", Bug("no wait for TMA", SM90, FULL, ";")),
    ("sm90", Bug("no wait for the consumer", SM90, EMPTY, ";")),
    ("sm90 wide", Bug("no wait for wgmma", SM90, "wgmma_wait<1>();", "wgmma_wait<7>();")),
    ("sm90", Bug("no order of the warpgroups", SM90, "barrier_sync(order(group), 256);", ";")),
    ("sm90", Bug("wrong byte count", SM90, EXPECT, "mbarrier_arrive_expect(S::full(bars, s), S::STAGE - 16);")),
    ("sm90", Bug("a number too many in a map", SM90, INNER, f"{INNER} + 1")),
    ("sm90 wide", Bug("a row too few", EPILOGUE, "m + row < g.M", "m + row < g.M - 1")),
]  # fmt: skip
SOURCES = ["gemm.cu", "linear.cu", "rows.cu", "device.cu"]
SOURCES += [f"sm{sm}/gemm_{dtype}.cu" for sm in (80, 90) for dtype in ("bf16", "f16")]


@pytest.fixture(scope="module")
def planted():
    sources = [*(f"cuda/{s}" for s in SOURCES), "ops/cuda/linear.cpp"]
    return Planted("linear", sources, [bug for _, bug in BUGS])


def wrong(planted, bug: str | None, kernel: str) -> bool:
    """Whether some schedule shows it: a fault, a write outside, or a result that is not right."""
    x, w = (torch.full((n, 1112), torch.nan).bfloat16() for n in (200, 131))
    x[:, :1100], w[:, :1100] = torch.randn(200, 1100), torch.randn(131, 1100) / 33
    x, w, b = x[:, :1100], w[:, :1100], torch.randn(131).bfloat16()
    expected = F.linear(x.double(), w.double(), b.double())
    for eager, seed in ((False, 0), (True, 1), (False, 2), (True, 3)):
        try:
            with (
                planted.bug(bug, KERNELS[kernel][0], eager, seed),
                gemm_kernel(kernel, planted.library),
                guarded_outputs(),
            ):
                out = fasttx.linear(x, w, b, backend="cuda")
        except (RuntimeError, AssertionError):
            return True
        if not torch.allclose(out.double(), expected, atol=2e-2, rtol=1e-2):
            return True
    return False


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_bug_all_is_well(planted, kernel):
    assert not wrong(planted, None, kernel)


@pytest.mark.parametrize(("kernel", "bug"), BUGS, ids=lambda v: getattr(v, "name", v))
def test_a_planted_bug_is_caught(planted, kernel, bug):
    assert wrong(planted, bug.name, kernel)
