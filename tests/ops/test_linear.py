"""linear on every backend and dtype against fp64, in the one harness."""
# ruff: noqa: E501 (tables, one case a line)

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fasttx
from fasttx.ops.linear import ACTIVATIONS, linear_bwd, linear_fwd
from fasttx.reference.linear import linear_math
from fasttx.testing import check, guarded_outputs, recorded_calls
from tests.conftest import unusable
from tests.ops import contract
from tests.ops.contract import (
    DTYPES,
    backend_fixture,
    check_compiled,
    every_case,
    opcheck,
    refused,
    skip_unusable,
)

BACKENDS = (*contract.BACKENDS, "torch")
NAMES = ("x", "weight", "bias", "residual")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.linear runs on the plain"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


@dataclass
class Case:
    """leading dimensions of x, K, N; which of NAMES are there; the activation."""

    name: str
    leading: tuple
    K: int
    N: int
    activation: str | None = None
    given: tuple = NAMES
    layouts: dict = field(default_factory=dict)
    quick: bool = False

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(len(self.name))
        shapes = {
            "x": (*self.leading, self.K), "weight": (self.N, self.K), "bias": (self.N,),
            "residual": (*self.leading, self.N),
        }  # fmt: skip
        made = {
            n: torch.randn(shapes[n], generator=generator, dtype=torch.float64) for n in self.given
        }
        made["weight"] /= max(1, self.K) ** 0.5
        return made

    def function(self, backend: str | None, compute: torch.dtype | None = None):
        def call(**inputs):
            given = [inputs.get(n) for n in NAMES]
            if compute is None:
                return fasttx.linear(
                    *given[:3], activation=self.activation, residual=given[3], backend=backend
                )
            return linear_math(*given, ACTIVATIONS[self.activation], False, compute=compute)[0]

        return call


TURNED = {"weight": "transposed"}
CASES = [
    Case("gelu", (5, 3), 33, 20, "gelu", quick=True),
    Case("gelu tanh", (17,), 34, 70, "gelu_tanh"),
    Case("relu", (70,), 16, 5, "relu"),
    Case("silu, transposed weight", (3, 2), 24, 18, "silu", layouts=TURNED, quick=True),
    Case("plain", (4,), 64, 130, given=NAMES[:2]),
    Case("bias", (100,), 40, 48, given=NAMES[:3]),
    Case("bias, transposed weight", (100,), 40, 48, given=NAMES[:3], layouts=TURNED),
    Case("one row", (), 50, 40, "gelu"),
    Case("twelve rows", (12,), 100, 66, "gelu"),
    Case("thirteen rows", (13,), 100, 66, "gelu"),
    Case("many rows", (450,), 20, 36, "gelu"),
    Case("long sums", (20,), 3700, 20),
    Case("no rows", (0, 3), 12, 8, "gelu"),
    Case("no columns", (3,), 12, 0, "gelu"),
    Case("no sums", (3,), 0, 8, "gelu"),
    Case("ones", (1, 1), 1, 1, "silu"),
    Case("strided", (6, 5), 24, 18, "gelu", layouts={"x": "strided", "weight": "strided", "bias": "strided", "residual": "strided", "dout": "strided"}),
    Case("sliced", (40,), 26, 34, "gelu", layouts={"x": "sliced", "weight": "sliced", "residual": "sliced", "dout": "sliced"}),
    Case("transposed", (4, 5), 24, 18, "gelu", layouts={"x": "transposed", "residual": "transposed", "dout": "transposed"}, quick=True),
    Case("expanded", (8, 4), 24, 18, "relu", layouts={"dout": "expanded"}),
]  # fmt: skip
BY_NAME = {c.name: c for c in CASES}


backend = backend_fixture("linear_fwd", BACKENDS)


@pytest.mark.parametrize(("name", "dtype", "case"), list(every_case(CASES, backends=BACKENDS)))
def test_against_fp64(name: str, dtype: torch.dtype, case: Case):
    skip_unusable("linear_fwd", name)
    check(
        case.function(name), case.function(None, compute=torch.float64),
        case.function(None, compute=dtype), case.inputs(), dtype=dtype,
        wanted=case.given, layouts=case.layouts,
    )  # fmt: skip
    out = case.function(name)(**{n: t.to(dtype) for n, t in case.inputs().items()})
    assert out.dtype is dtype and out.is_contiguous()


def test_is_torch():
    x, w, b = torch.randn(4, 9).double(), torch.randn(5, 9).double(), torch.randn(5).double()
    pre = F.linear(x, w, b)
    for name, function in (
        (None, lambda x: x),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
        ("silu", F.silu),
    ):
        want = function(pre)
        torch.testing.assert_close(fasttx.linear(x, w, b, activation=name), want)
        got = fasttx.linear(x.float(), w.float(), b.float(), activation=name)
        torch.testing.assert_close(got, want.float(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradcheck(activation):
    leaves = [t.double().requires_grad_() for t in (torch.randn(3, 5), torch.randn(4, 5), torch.randn(4), torch.randn(3, 4))]  # fmt: skip

    def function(x, w, b, r):
        return fasttx.linear(x, w, b, residual=r, activation=activation)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_activation_everywhere(activation):
    """Values and slopes of the CPU's own functions, tails included, against fp64."""
    skip_unusable("linear_fwd", "cpu")
    x = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -100.0, 1e-20, 0.0, 100.0, 1e4])]
    )
    one, leaf = torch.ones(1, 1), x[:, None].clone().requires_grad_()
    got = fasttx.linear(leaf, one, activation=activation, backend="cpu")
    slope = torch.autograd.grad(got.sum(), leaf)[0]
    wide = leaf.detach().double().requires_grad_()
    want = fasttx.linear(wide, one.double(), activation=activation)
    expected = torch.autograd.grad(want.sum(), wide)[0]
    # A few fp32 roundings of values of the size of x, and of slopes near 1.
    assert ((got - want).abs() <= 3e-7 * wide.abs().clamp(min=1)).all()
    assert ((slope - expected).abs() <= 1e-6).all()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradient_penalty(backend, activation):
    results = []
    tensors = torch.randn(4, 9), torch.randn(6, 9), torch.randn(6)
    plain = F.gelu if activation else lambda x: x
    for function in (
        lambda x, w, b: fasttx.linear(x, w, b, activation=activation, backend=backend),
        lambda x, w, b: plain(F.linear(x, w, b)),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


def test_backends_follow_each_other(backend):
    x, w, b, g = torch.randn(7, 20), torch.randn(12, 20) / 4, torch.randn(12), torch.randn(7, 12)
    expected = None
    for first in BACKENDS:
        if unusable("linear_fwd", first):
            continue
        pre = linear_fwd(x, w, b, None, 1, True, backend=first)[1]
        grads = linear_bwd(x, w, pre, g, 1, 7, backend=backend)
        expected = expected or grads
        torch.testing.assert_close(grads, expected, atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("need", range(1, 16))
def test_every_subset_of_gradients(need):
    skip_unusable("linear_fwd", "cpu")
    for case in (BY_NAME["gelu"], BY_NAME["bias"]):
        wanted = tuple(n for i, n in enumerate(NAMES) if need >> i & 1 and n in case.given)
        gold = case.function(None, compute=torch.float64)
        plain = case.function(None, compute=torch.float32)
        check(case.function("cpu"), gold, plain, case.inputs(), dtype=torch.float32, wanted=wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_size(dtype):
    """Tails of tiles in every direction, both layouts of the weight."""
    skip_unusable("linear_fwd", "cpu")
    sizes = [(m, k, n) for m in (1, 2, 5, 11, 14, 33, 65) for k, n in ((7, 3), (32, 16), (35, 18), (66, 65))]  # fmt: skip
    for m, k, n in sizes:
        x, w, g = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (m, n)))
        wide = [t.double().requires_grad_() for t in (x, w)]
        gold = F.linear(*wide)
        expected = torch.autograd.grad(gold, wide, g.double())
        for turned in (False, True):
            leaves = [x.clone().requires_grad_(), (w.t().contiguous().t() if turned else w.clone()).requires_grad_()]  # fmt: skip
            with guarded_outputs():
                out = fasttx.linear(*leaves, backend="cpu")
                grads = torch.autograd.grad(out, leaves, g)
            assert grads[1].stride() == leaves[1].stride()
            unit = torch.finfo(dtype).eps
            for got, want in zip((out, *grads), (gold, *expected), strict=True):
                assert (got - want).abs().max() <= 2 * unit * want.abs().max() + 2e-5


def test_the_result_may_be_changed_in_place():
    x, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, 5)
    out = fasttx.linear(x, weight)
    out += 1
    out.mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight.sum(0).expand_as(x))


def test_hundred_thousand_rows():
    """Gradients of parameters summed over chunks of rows are as near to fp64 as of a few."""
    skip_unusable("linear_fwd", "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        x, g = torch.randn(100_000, 8).to(dtype), (torch.randn(100_000, 12) + 1).to(dtype)
        for turned in (False, True):
            w = torch.randn(12, 8).to(dtype)
            w, b = (w.t().contiguous().t() if turned else w).requires_grad_(), torch.zeros(12).to(dtype).requires_grad_()  # fmt: skip
            got = torch.autograd.grad(fasttx.linear(x, w, b, backend="cpu"), (w, b), g)
            assert got[0].stride() == w.stride()
            unit = torch.finfo(dtype).eps
            want = g.double().T @ x.double()
            assert (got[0] - want).abs().max() <= 2 * unit * want.abs().max() + 4e-3
            torch.testing.assert_close(got[1].double(), g.double().sum(0), rtol=2 * unit, atol=0)


def test_nothing_depends_on_threads_or_the_run():
    results, before = [], torch.get_num_threads()
    x, w, b = torch.randn(300, 96).bfloat16(), torch.randn(80, 96).bfloat16(), torch.randn(80).bfloat16()  # fmt: skip
    for rows in (300, 30, 3):
        results = []
        try:
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                leaves = [t.clone().requires_grad_() for t in (x[:rows], w, b)]
                out = fasttx.linear(*leaves, activation="gelu")
                results.append([out, *torch.autograd.grad(out, leaves, x[:rows, :80])])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [5, 40])
def test_nan_stays_in_its_row(backend, bad, rows):
    x, w = torch.randn(rows, 40), torch.randn(6, 40)
    x[2, 7] = bad
    out = fasttx.linear(x, w, activation="silu", backend=backend)
    assert not out[2].isfinite().all()
    assert out[[0, 1, 3, 4]].isfinite().all()


def test_autocast():
    x, w, b, r = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5), torch.randn(3, 5)
    for residual in (None, r, r.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            got = fasttx.linear(*leaves, residual=residual)
            want = F.linear(x, w, b)
            want = want if residual is None else want + residual
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, atol=5e-2, rtol=2e-2)
        grads = torch.autograd.grad(got.float().sum(), leaves)
        assert all(g.dtype is torch.float32 for g in grads)


@pytest.mark.parametrize("name", ["gelu", "bias, transposed weight", "transposed", "no rows"])
def test_opcheck_and_fake(name):
    case = BY_NAME[name]
    with recorded_calls() as calls:
        leaves = {n: t.float() for n, t in case.inputs().items()}
        if "weight" in case.layouts:
            leaves["weight"] = leaves["weight"].t().contiguous().t()
        leaves = {n: t.requires_grad_() for n, t in leaves.items()}
        case.function(None)(**leaves).sum().backward()
    assert [op.name for op, _, _ in calls] == ["linear_fwd", "linear_bwd"]
    for op, args, _ in calls:
        opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def full(x, w, b, r):
        return fasttx.linear(fasttx.linear(x, w, b, activation="gelu"), w.t(), residual=r)

    def arguments(rows):
        shapes = ((2, rows, 24), (16, 24), (16,), (2, rows, 24))
        return [torch.randn(s, requires_grad=True) for s in shapes]

    check_compiled(full, arguments, dynamic)


def test_more_than_32_bit_offsets():
    """A row 2^31 elements after the first one: a stride, not memory."""
    skip_unusable("linear_fwd", "cpu")
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.float16)  # touched only where rows lie
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    x = memory.as_strided((2, 40), (2**31, 1))
    x.copy_(torch.randn(2, 40))
    w = torch.randn(2, 40).half()
    assert torch.equal(fasttx.linear(x, w), fasttx.linear(x.clone(), w))
    assert torch.equal(fasttx.linear(w.repeat(10, 1), x), fasttx.linear(w.repeat(10, 1), x.clone()))


X, WEIGHT = torch.randn(2, 6, 8), torch.randn(4, 8)
BAD = {
    "x type": (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    "x dtype": (TypeError, "x must be float32, .* got int64", {"x": X.long()}),
    "x scalar": (ValueError, "x must have at least 1 dimension, got a scalar", {"x": X[0, 0, 0]}),
    "x width": (ValueError, r"weight must have shape \[N, 7\], got \(4, 8\)", {"x": X[..., 1:]}),
    "weight none": (TypeError, "weight must be a tensor, got NoneType", {"weight": None}),
    "weight type": (TypeError, "weight must be a tensor, got int", {"weight": 1}),
    "weight rank": (ValueError, r"weight must have shape \[N, 8\], got \(8,\)", {"weight": WEIGHT[0]}),
    "weight dtype": (TypeError, "weight must have x's dtype float32, got bfloat16", {"weight": WEIGHT.bfloat16()}),
    "weight device": (ValueError, "weight must be on x's device cpu, got meta", {"weight": WEIGHT.to("meta")}),
    "bias shape": (ValueError, r"bias must have shape \(4,\), got \(8,\)", {"bias": torch.ones(8)}),
    "bias dtype": (TypeError, "bias must have x's dtype float32, got float16", {"bias": torch.ones(4).half()}),
    "bias int": (TypeError, "bias must be float32, .* got int64", {"bias": torch.ones(4).long()}),
    "residual shape": (ValueError, r"residual must have shape \(2, 6, 4\), got \(6, 4\)", {"residual": X[0, :, :4]}),
    "residual dtype": (TypeError, "residual must have x's dtype float32, got bfloat16", {"residual": X[..., :4].bfloat16()}),
    "residual device": (ValueError, "residual must be on x's device cpu, got meta", {"residual": X[..., :4].to("meta")}),
    "activation": (ValueError, "activation must be None, 'gelu', 'gelu_tanh', 'relu', 'silu', got 'tanh'", {"activation": "tanh"}),
    "activation type": (ValueError, "activation must be None, .*got 1", {"activation": 1}),
    "backend": (ValueError, "backend must be None or one of cpu, cuda, triton, reference, torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(monkeypatch, fasttx.linear, BAD[name], x=X, weight=WEIGHT)


def test_unsupported_lists_every_reason():
    with pytest.raises(NotImplementedError, match=r"cpu: needs float32.*got float64"):
        fasttx.linear(X.double(), WEIGHT.double(), backend="cpu")
