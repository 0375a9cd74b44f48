"""ffn on every backend and dtype against fp64, in the one harness."""
# ruff: noqa: E501 (tables, one case a line)

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fasttx
from fasttx.ops.ffn import ffn_bwd, ffn_fwd
from fasttx.ops.linear import ACTIVATIONS
from fasttx.reference.ffn import ffn_math
from fasttx.reference.philox import philox_mask
from fasttx.testing import check, recorded_calls
from tests.conftest import unusable
from tests.ops.contract import (
    BACKENDS,
    DTYPES,
    backend_fixture,
    check_compiled,
    every_case,
    opcheck,
    refused,
    skip_unusable,
)

NAMES = ("x", "w1", "b1", "w2", "b2", "w_gate", "b_gate")
PLAIN, WEIGHTS = NAMES[:5], ("x", "w1", "w2")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.ffn runs on the plain"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


@dataclass
class Case:
    """leading dimensions of x; K, F and N; which of NAMES are there; options of the door."""

    name: str
    leading: tuple
    sizes: tuple
    given: tuple = PLAIN
    options: dict = field(default_factory=dict)
    layouts: dict = field(default_factory=dict)
    quick: bool = False

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(len(self.name))
        K, hidden, N = self.sizes
        shapes = {
            "x": (*self.leading, K), "w1": (hidden, K), "b1": (hidden,), "w2": (N, hidden),
            "b2": (N,), "w_gate": (hidden, K), "b_gate": (hidden,),
        }  # fmt: skip
        made = {
            n: torch.randn(shapes[n], generator=generator, dtype=torch.float64) for n in self.given
        }
        for name in ("w1", "w2", "w_gate"):
            if name in made:
                made[name] /= max(1, made[name].shape[1]) ** 0.5
        return made

    def function(self, backend: str | None, compute: torch.dtype | None = None, **more):
        def call(**inputs):
            given = [inputs.get(n) for n in NAMES]
            options = {**self.options, **more}
            if compute is None:
                return fasttx.ffn(
                    *given[:5], w_gate=given[5], b_gate=given[6], **options, backend=backend
                )
            code = ACTIVATIONS[GATES.get(name := options.get("activation", "gelu"), name)]
            return ffn_math(
                *given, torch.tensor([options.get("seed", 0)]), code,
                options.get("hidden_dropout_p", 0.0), options.get("dropout_p", 0.0), False,
                compute=compute,
            )[0]  # fmt: skip

        return call


GATES = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "swiglu": "silu"}
DROP = {"hidden_dropout_p": 0.3, "dropout_p": 0.2, "seed": 11}
AGAIN = {"recompute": True}
TURNED = {"w1": "transposed", "w2": "transposed", "w_gate": "transposed"}
CASES = [
    Case("plain", (5, 3), (20, 33, 18), quick=True),
    Case("everything", (3, 7), (18, 37, 20), NAMES, {**DROP, "activation": "swiglu"}, quick=True),
    Case("everything again", (20,), (18, 37, 20), NAMES, {**DROP, **AGAIN, "activation": "geglu_tanh"}, TURNED, quick=True),
    Case("one row", (), (40, 70, 24), NAMES, {**DROP, "activation": "reglu"}),
    Case("twelve rows", (12,), (34, 66, 70), NAMES, {**DROP, "activation": "geglu"}),
    Case("thirteen rows", (13,), (34, 66, 70), NAMES, {**DROP, "activation": "gelu"}),
    Case("no biases", (70,), (24, 50, 30), WEIGHTS, {"activation": "relu"}),
    Case("gate alone", (66,), (24, 50, 30), (*WEIGHTS, "w_gate"), {"activation": "silu", **AGAIN}),
    Case("hidden dropout", (40,), (16, 150, 8), PLAIN, {"hidden_dropout_p": 0.5, "seed": -3}),
    Case("output dropout", (40,), (16, 24, 150), PLAIN, {"dropout_p": 0.5, "seed": 2**40}),
    Case("many rows", (560,), (9, 20, 10), PLAIN, DROP),
    Case("transposed weights", (30,), (36, 50, 34), PLAIN, {}, TURNED),
    Case("no rows", (0, 2), (12, 8, 6), NAMES, DROP),
    Case("no hidden", (3,), (12, 0, 6), NAMES),
    Case("no columns", (15,), (12, 8, 0), NAMES),
    Case("no inputs", (15,), (0, 8, 6), NAMES),
    Case("ones", (1,), (1, 1, 1), NAMES),
    Case("strided", (6, 5), (16, 40, 18), NAMES, DROP, dict.fromkeys((*NAMES, "dout"), "strided")),
    Case("sliced", (30,), (16, 40, 18), NAMES, {}, dict.fromkeys((*NAMES, "dout"), "sliced")),
    Case("transposed", (4, 8), (16, 40, 18), PLAIN, DROP, {"x": "transposed", "dout": "transposed"}),
    Case("expanded", (8, 4), (16, 40, 18), PLAIN, {}, {"dout": "expanded"}),
]  # fmt: skip
BY_NAME = {c.name: c for c in CASES}


backend = backend_fixture("ffn_fwd")


@pytest.mark.parametrize(("name", "dtype", "case"), list(every_case(CASES)))
def test_against_fp64(name: str, dtype: torch.dtype, case: Case):
    skip_unusable("ffn_fwd", name)
    check(
        case.function(name), case.function(None, compute=torch.float64),
        case.function(None, compute=dtype), case.inputs(), dtype=dtype,
        wanted=case.given, layouts=case.layouts,
    )  # fmt: skip
    out = case.function(name)(**{n: t.to(dtype) for n, t in case.inputs().items()})
    assert out.dtype is dtype and out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [c for c in CASES if "seed" not in c.options], ids=lambda c: c.name
)
def test_unfused_against_fp64(dtype, case):
    """backend="torch"; without dropout, whose bits PyTorch does not have."""
    check(
        case.function("torch"), case.function(None, compute=torch.float64),
        case.function(None, compute=dtype), case.inputs(), dtype=dtype,
        wanted=case.given, layouts=case.layouts,
    )  # fmt: skip


def test_unfused_has_no_dropout():
    inputs = {n: t.float() for n, t in BY_NAME["everything"].inputs().items()}
    with pytest.raises(NotImplementedError, match="torch: does not support seed"):
        BY_NAME["everything"].function("torch")(**inputs)


def test_is_torch():
    x, w1, w2 = (torch.randn(s).double() for s in ((4, 9), (30, 9), (7, 30)))
    b1, b2, wg = torch.randn(30).double(), torch.randn(7).double(), torch.randn(30, 9).double()
    want = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    torch.testing.assert_close(fasttx.ffn(x, w1, b1, w2, b2), want)
    floats = [t.float() for t in (x, w1, b1, w2, b2)]
    torch.testing.assert_close(fasttx.ffn(*floats), want.float(), atol=1e-5, rtol=1e-5)
    want = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, wg), w2)
    for name in ("swiglu", "silu"):
        torch.testing.assert_close(
            fasttx.ffn(x, w1, None, w2, None, w_gate=wg, activation=name), want
        )


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(activation, gated):
    case = Case("", (2,), (3, 4, 2), NAMES if gated else PLAIN, {**DROP, "activation": activation})
    leaves = [t.requires_grad_() for t in case.inputs().values()]

    def function(*tensors):
        return case.function(None)(**dict(zip(case.given, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)
    if activation == "silu":
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_penalty(backend, recompute):
    case, results = Case("", (4,), (9, 12, 5)), []
    for function in (
        case.function(backend, recompute=recompute),
        lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
    ):
        leaves = {n: t.float().requires_grad_() for n, t in case.inputs().items()}
        out, leaves = function(**leaves).pow(3).sum(), list(leaves.values())
        grads = torch.autograd.grad(out, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        results.append([*grads, *second])
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


def test_backends_follow_each_other(backend):
    """Any backend's backward follows any backend's forward, with what it keeps and without."""
    case = Case("", (7,), (10, 24, 12), NAMES)
    x, w1, b1, w2, b2, wg, bg = (t.float() for t in case.inputs().values())
    seed, g, expected = torch.tensor([9]), torch.randn(7, 12), None
    for first in BACKENDS:
        if unusable("ffn_fwd", first):
            continue
        kept = ffn_fwd(x, w1, b1, w2, b2, wg, bg, seed, 4, 0.3, 0.2, True, backend=first)[1:]
        for pre in (kept, (None, None)):
            grads = ffn_bwd(x, *pre, g, w1, b1, w2, wg, bg, seed, 4, 0.3, 0.2, 127, backend=backend)
            expected = expected or grads
            torch.testing.assert_close(grads, expected, atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("need", [*range(1, 128, 5), *(1 << i for i in range(7)), 126, 127])
def test_every_subset_of_gradients(need):
    skip_unusable("ffn_fwd", "cpu")
    for case in (BY_NAME["everything"], BY_NAME["plain"]):
        wanted = tuple(n for i, n in enumerate(NAMES) if need >> i & 1 and n in case.given)
        gold = case.function(None, compute=torch.float64)
        plain = case.function(None, compute=torch.float32)
        check(case.function("cpu"), gold, plain, case.inputs(), dtype=torch.float32, wanted=wanted)


def test_recompute_keeps_only_x():
    """The same numbers, nothing of the hidden layer's size held between forward and backward."""
    case = Case("", (40,), (10, 500, 12), NAMES, {**DROP, "activation": "swiglu"})
    results = []
    for recompute in (False, True):
        sizes = []
        leaves = {n: t.float().requires_grad_() for n, t in case.inputs().items()}

        def pack(t, sizes=sizes):
            sizes.append(t.shape)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = case.function(None, recompute=recompute)(**leaves)
        assert (torch.Size((40, 500)) in sizes) is not recompute
        results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("seed", [0, -1, 2**33 + 5])
def test_dropout_bits(backend, seed, rows):
    """h = 1 where kept: its columns show the hidden bits, their sum times ones the output's."""
    hidden, N = 30, 37
    x, one = torch.ones(rows, 1), torch.ones(hidden, 1)
    eye = torch.eye(hidden)
    key = torch.tensor([seed])
    got = fasttx.ffn(x, one, None, eye, None, activation="relu", hidden_dropout_p=0.25, seed=seed, backend=backend)  # fmt: skip
    keep = philox_mask(key, 0.25, 1, 1, rows, hidden)[0, 0]
    assert torch.equal(got, keep * torch.tensor(1 / 0.75))
    got = fasttx.ffn(x, one[:1], None, torch.ones(N, 1), None, activation="relu", dropout_p=0.25, seed=seed, backend=backend)  # fmt: skip
    keep = philox_mask(key, 0.25, 1, 2, rows, N)[0, 1]
    assert torch.equal(got, keep * torch.tensor(1 / 0.75))


def test_manual_seed_governs_dropout():
    case, draws = BY_NAME["plain"], []
    inputs = {n: t.float() for n, t in case.inputs().items()}
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(case.function(None, dropout_p=0.5, hidden_dropout_p=0.5)(**inputs))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_many_chunks():
    """Gradients of parameters summed over several chunks of rows, whatever their memory order."""
    skip_unusable("ffn_fwd", "cpu")
    case = Case("", (9000,), (6, 8, 10), NAMES, {**DROP, "activation": "geglu"})
    for dtype in (torch.float32, torch.bfloat16):
        for layouts in ({}, TURNED):
            check(
                case.function("cpu"), case.function(None, compute=torch.float64),
                case.function(None, compute=dtype), case.inputs(), dtype=dtype,
                wanted=NAMES, layouts=layouts,
            )  # fmt: skip


def test_nothing_depends_on_threads_or_the_run():
    case, before = Case("", (300,), (40, 150, 70), NAMES, DROP), torch.get_num_threads()
    for rows in (300, 30, 3):
        results = []
        try:
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                inputs = {n: t.bfloat16() for n, t in case.inputs().items()}
                inputs["x"] = inputs["x"][:rows]
                leaves = {n: t.requires_grad_() for n, t in inputs.items()}
                out = case.function(None)(**leaves)
                results.append([out, *torch.autograd.grad(out.sum(), list(leaves.values()))])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rows", [5, 40])
def test_nan_stays_in_its_row(backend, rows):
    case = Case("", (rows,), (16, 40, 12))
    inputs = {n: t.float() for n, t in case.inputs().items()}
    inputs["x"][2, 7] = torch.nan
    out = case.function(backend)(**inputs)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()


def test_autocast():
    case = BY_NAME["everything"]
    inputs = {n: t.float().requires_grad_() for n, t in case.inputs().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.function(None)(**inputs)
    assert got.dtype is torch.bfloat16
    want = case.function(None)(**inputs)
    torch.testing.assert_close(got.float(), want, atol=5e-2, rtol=5e-2)
    grads = torch.autograd.grad(got.float().sum(), list(inputs.values()))
    assert all(g.dtype is torch.float32 for g in grads)


@pytest.mark.parametrize("name", ["plain", "everything", "everything again", "no rows"])
def test_opcheck_and_fake(name):
    case = BY_NAME[name]
    with recorded_calls() as calls:
        leaves = {n: t.float() for n, t in case.inputs().items()}
        leaves |= {n: leaves[n].t().contiguous().t() for n in case.layouts}
        leaves = {n: t.requires_grad_() for n, t in leaves.items()}
        case.function(None)(**leaves).sum().backward()
    assert [op.name for op, _, _ in calls] == ["ffn_fwd", "ffn_bwd"]
    for op, args, _ in calls:
        opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def full(x, w1, b1, w2, b2, wg):
        h = fasttx.ffn(x, w1, b1, w2, b2, hidden_dropout_p=0.2, dropout_p=0.1, seed=3)
        return fasttx.ffn(h, w1, None, w2, None, w_gate=wg, activation="swiglu", recompute=True)

    def arguments(rows):
        shapes = ((2, rows, 12), (24, 12), (24,), (12, 24), (12,), (24, 12))
        return [torch.randn(s, requires_grad=True) for s in shapes]

    check_compiled(full, arguments, dynamic, atol=1e-3, rtol=1e-4)


X, W1, W2 = torch.randn(2, 6, 8), torch.randn(4, 8), torch.randn(5, 4)
BAD = {
    "x type": (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    "x scalar": (ValueError, "x must have at least 1 dimension, got a scalar", {"x": X[0, 0, 0]}),
    "w1 shape": (ValueError, r"w1 must have shape \[F, 8\], got \(5, 4\)", {"w1": W2}),
    "w1 none": (TypeError, "w1 must be a tensor, got NoneType", {"w1": None}),
    "w1 dtype": (TypeError, "w1 must have x's dtype float32, got bfloat16", {"w1": W1.bfloat16()}),
    "w2 shape": (ValueError, r"w2 must have shape \[N, 4\], got \(4, 8\)", {"w2": W1}),
    "w2 device": (ValueError, "w2 must be on x's device cpu, got meta", {"w2": W2.to("meta")}),
    "b1 shape": (ValueError, r"b1 must have shape \(4,\), got \(5,\)", {"b1": torch.ones(5)}),
    "b2 shape": (ValueError, r"b2 must have shape \(5,\), got \(4,\)", {"b2": torch.ones(4)}),
    "b2 dtype": (TypeError, "b2 must have x's dtype float32, got float16", {"b2": torch.ones(5).half()}),
    "gate shape": (ValueError, r"w_gate must have shape \[4, 8\], got \(5, 4\)", {"w_gate": W2}),
    "gate bias": (ValueError, "b_gate must be None without w_gate, got a tensor", {"b_gate": torch.ones(4)}),
    "gate bias shape": (ValueError, r"b_gate must have shape \(4,\), got \(5,\)", {"w_gate": W1, "b_gate": torch.ones(5)}),
    "activation": (ValueError, "activation must be one of 'gelu', 'gelu_tanh', 'relu', 'silu', got 'elu'", {"activation": "elu"}),
    "no activation": (ValueError, "activation must be one of .*got None", {"activation": None}),
    "gated name": (ValueError, "activation must be one of .*got 'swiglu' without w_gate", {"activation": "swiglu"}),
    "dropout": (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
    "hidden dropout": (ValueError, r"hidden_dropout_p must be in \[0, 1\), got -0.5", {"hidden_dropout_p": -0.5}),
    "dropout type": (TypeError, r"dropout_p must be in \[0, 1\), got '0'", {"dropout_p": "0"}),
    "seed": (ValueError, "seed must be a 64-bit int.*got 'x'", {"seed": "x", "dropout_p": 0.1}),
    "backend": (ValueError, "backend must be None or one of cpu, cuda, triton, reference, torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip


def test_the_result_may_be_changed_in_place():
    x = torch.randn(2, 3, 5, requires_grad=True)
    w1, w2 = torch.randn(7, 5), torch.randn(5, 7)
    out = fasttx.ffn(x, w1, None, w2, None, activation="relu")
    expected = torch.autograd.grad(F.linear(F.linear(x, w1).relu(), w2).sum(), x)[0]
    out += 1
    out.mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * expected)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(monkeypatch, fasttx.ffn, BAD[name], x=X, w1=W1, b1=None, w2=W2, b2=None)


def test_unsupported_lists_every_reason():
    with pytest.raises(NotImplementedError, match=r"cpu: needs float32.*got float64"):
        fasttx.ffn(X.double(), W1.double(), None, W2.double(), None, backend="cpu")
