"""add_norm, layer_norm and rms_norm on every backend and dtype against fp64, in the one harness."""
# ruff: noqa: E501 (tables, one case a line)

import itertools
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fasttx
from fasttx.ops.add_norm import add_norm_bwd, add_norm_fwd
from fasttx.reference.add_norm import add_norm_math
from fasttx.reference.philox import philox_mask
from fasttx.testing import check, guarded_outputs, recorded_calls
from tests.conftest import unusable
from tests.ops import contract
from tests.ops.contract import (
    backend_fixture,
    check_compiled,
    every_case,
    opcheck,
    refused,
    skip_unusable,
)

BACKENDS = (*contract.BACKENDS, "torch")
NAMES = ("x", "residual", "weight", "bias", "x_bias")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.add_norm runs on the plain"),
    # NumPy's word for inf - inf under the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


@dataclass
class Case:
    """shape of x; which of NAMES are there; options of the door."""

    name: str
    shape: tuple
    given: tuple = NAMES
    options: dict = field(default_factory=dict)
    layouts: dict = field(default_factory=dict)
    keep: tuple = ()
    quick: bool = False

    @property
    def names(self) -> tuple:
        return ("out", "total") if self.options.get("prenorm") else ("out",)

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(len(self.name))
        shapes = {n: self.shape if n in NAMES[:2] else self.shape[-1:] for n in self.given}
        made = {
            n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
        }
        for name in self.keep:
            made[name] = made[name].float()
        return made

    def function(self, backend: str | None, compute: torch.dtype | None = None):
        def call(**inputs):
            inputs = {n: inputs.get(n) for n in NAMES}
            if compute is None:
                return fasttx.add_norm(**inputs, **self.options, backend=backend)
            o = {"eps": 1e-5, "dropout_p": 0.0, "kind": "layer", "seed": 0, **self.options}
            prenorm = o.get("prenorm", False)
            outputs = add_norm_math(
                *inputs.values(), torch.tensor([o["seed"]]), o["eps"], o["dropout_p"],
                o["kind"] == "rms", prenorm, False, compute=compute,
            )  # fmt: skip
            return outputs[:2] if prenorm else outputs[0]

        return call


RMS, DROP = {"kind": "rms"}, {"dropout_p": 0.3, "seed": 11}
CASES = [
    Case("residual", (5, 3, 33), NAMES[:4], quick=True),
    Case("everything", (4, 37), NAMES, {**DROP, "prenorm": True}, quick=True),
    Case("everything rms", (3, 2, 65), NAMES, {**DROP, **RMS, "prenorm": True}, quick=True),
    Case("plain layer norm", (9, 768), ("x", "weight", "bias")),
    Case("plain rms norm", (9, 768), ("x", "weight"), RMS),
    Case("no parameters", (6, 100), ("x", "residual")),
    Case("x alone", (70, 17), ("x",), {"eps": 0.1}),
    Case("prenorm", (7, 48), NAMES[:4], {"prenorm": True}),
    Case("one vector", (19,), NAMES, DROP),
    Case("one column", (5, 1), NAMES[:4]),
    Case("one row", (1, 300), NAMES, DROP),
    Case("no rows", (0, 12), NAMES, DROP),
    Case("no columns", (3, 0), NAMES[:4]),
    Case("wide", (2, 9001), NAMES, DROP),
    Case("many rows", (1111, 40), NAMES),
    Case("five dimensions", (2, 2, 1, 3, 20), NAMES, {"prenorm": True}),
    Case("transposed", (3, 5, 24), NAMES, DROP, {"x": "transposed", "residual": "transposed", "dout": "transposed"}, quick=True),
    Case("strided", (3, 5, 24), NAMES, {}, {"x": "strided", "residual": "sliced", "weight": "strided", "dout": "strided"}),
    # 16 rows: a power of two, so that whether a sum of equal values rounds is not a matter of luck.
    Case("expanded", (4, 4, 24), NAMES[:4], {"prenorm": True}, {"dout": "expanded", "dtotal": "expanded"}),
    Case("four dimensions sliced", (2, 3, 5, 20), NAMES, {}, {"x": "sliced", "residual": "transposed", "dout": "sliced"}),
    Case("fp32 residual and parameters", (6, 50), NAMES, DROP, keep=("residual", "weight", "bias", "x_bias")),
    Case("fp32 parameters", (6, 50), NAMES[:4], {}, keep=("weight", "bias")),
    Case("fp32 x", (6, 50), NAMES, {"prenorm": True}, keep=("x",)),
]  # fmt: skip
BY_NAME = {c.name: c for c in CASES}


backend = backend_fixture("add_norm_fwd", BACKENDS)


@pytest.mark.parametrize(("name", "dtype", "case"), list(every_case(CASES, backends=BACKENDS)))
def test_against_fp64(name: str, dtype: torch.dtype, case: Case):
    skip_unusable("add_norm_fwd", name)
    if name == "torch" and "dropout_p" in case.options:
        inputs = {n: t.to(dtype) for n, t in case.inputs().items()}
        with pytest.raises(NotImplementedError, match="torch: does not support seed"):
            case.function(name)(**inputs)
        return
    gold = case.function(None, compute=torch.float64)
    # A tensor that stays fp32 raises the outputs to fp32, and their rounding with them.
    wide = torch.float32 if {"x", "residual"} & set(case.keep) else dtype
    check(
        case.function(name), gold, case.function(None, compute=dtype), case.inputs(), dtype=dtype,
        wanted=case.given, names=case.names, keep=case.keep, layouts=case.layouts,
    )  # fmt: skip
    inputs = {n: t if n in case.keep else t.to(dtype) for n, t in case.inputs().items()}
    out = case.function(name)(**inputs)
    for t in out if isinstance(out, tuple) else (out,):
        assert t.dtype is wide and t.is_contiguous()


def test_is_torch():
    """The authority itself, and the plain forms, against PyTorch in fp64."""
    x, w, b = torch.randn(4, 9, 31).double(), torch.randn(31).double(), torch.randn(31).double()
    for backend in (None, "reference"):
        got = fasttx.layer_norm(x, weight=w, bias=b, eps=1e-3, backend=backend)
        torch.testing.assert_close(got, F.layer_norm(x, (31,), w, b, 1e-3))
        got = fasttx.rms_norm(x, weight=w, eps=1e-3, backend=backend)
        torch.testing.assert_close(got, F.rms_norm(x, (31,), w, 1e-3))
    x, w, b = x.float(), w.float(), b.float()
    torch.testing.assert_close(fasttx.layer_norm(x, weight=w), F.layer_norm(x, (31,), w))
    torch.testing.assert_close(fasttx.rms_norm(x), F.rms_norm(x, (31,), None, 1e-5))


@pytest.mark.parametrize("options", [{}, {**RMS, **DROP}])
def test_gradcheck(options):
    leaves = [torch.randn(3, 7).double().requires_grad_() for _ in range(2)]
    leaves += [torch.randn(7).double().requires_grad_() for _ in range(3)]

    def function(*tensors):
        return fasttx.add_norm(**dict(zip(NAMES, tensors, strict=True)), prenorm=True, **options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradient_penalty(backend):
    """A gradient of a gradient, where dx and dresidual are one tensor."""
    x, r, w = torch.randn(4, 9), torch.randn(4, 9), torch.randn(9)
    results = []
    for function in (
        lambda x, r, w: fasttx.add_norm(x, r, weight=w, backend=backend),
        lambda x, r, w: F.layer_norm(x + r, (9,), w),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, r, w)]
        grads = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-4)


def test_leaf_gradients_are_their_own():
    """dx and dresidual are one tensor in the backward, never in .grad."""
    x, r = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    fasttx.add_norm(x, r, weight=None).square().sum().backward()
    before = r.grad.clone()
    x.grad.zero_()
    assert torch.equal(r.grad, before)


def test_backends_follow_each_other(backend):
    """Any backend's backward follows any backend's forward."""
    x, r, w, xb = torch.randn(5, 40), torch.randn(5, 40), torch.randn(40), torch.randn(40)
    g, t = torch.randn(5, 40), torch.randn(5, 40)
    for rms, seed in itertools.product((False, True), (None, torch.tensor([9]))):
        expected, p = None, 0.0 if seed is None else 0.2
        able = BACKENDS if seed is None else contract.BACKENDS
        for first in able if backend in able else ():
            if unusable("add_norm_fwd", first):
                continue
            inputs = (x, r, w, w, xb, seed)
            stats = add_norm_fwd(*inputs, 1e-5, p, rms, True, False, backend=first)[2]
            grads = add_norm_bwd(x, stats, g, t, *inputs[1:], p, rms, 31, backend=backend)
            expected = expected or grads
            torch.testing.assert_close(grads, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("need", range(1, 32))
def test_every_subset_of_gradients(need):
    skip_unusable("add_norm_fwd", "cpu")
    for case in (BY_NAME["everything"], BY_NAME["prenorm"]):
        wanted = tuple(n for i, n in enumerate(NAMES) if need >> i & 1 and n in case.given)
        gold = case.function(None, compute=torch.float64)
        plain = case.function(None, compute=torch.float32)
        check(
            case.function("cpu"), gold, plain, case.inputs(), dtype=torch.float32, wanted=wanted,
            names=case.names,
        )  # fmt: skip


def test_only_the_sum_is_used(backend):
    x, r = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    w = torch.randn(8, requires_grad=True)
    total = fasttx.add_norm(x, r, weight=w, prenorm=True, backend=backend)[1]
    grads = torch.autograd.grad(total, (x, r, w), torch.ones(3, 8))
    assert (grads[0] == 1).all() and (grads[1] == 1).all() and (grads[2] == 0).all()


@pytest.mark.parametrize("seed", [0, -1, 2**33 + 5])
@pytest.mark.parametrize("N", [1, 30, 257])
@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_dropout_bits(backend, seed, N):
    """The sum shows them: row is the flattened row, batch and head 0."""
    skip_unusable("add_norm_fwd", backend)
    x = torch.ones(3, 7, N)
    options = {"weight": None, "dropout_p": 0.25, "seed": seed, "prenorm": True}
    total = fasttx.add_norm(x, **options, backend=backend)[1]
    keep = philox_mask(torch.tensor([seed]), 0.25, 1, 1, 21, N).view(3, 7, N)
    assert torch.equal(total, keep * torch.tensor(1 / 0.75))


def test_manual_seed_governs_dropout():
    x, draws = torch.randn(8, 64), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(fasttx.add_norm(x, weight=None, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_hundred_thousand_rows():
    """Parameter gradients of 10^5 rows are as near to fp64 as of a few."""
    skip_unusable("add_norm_fwd", "cpu")
    rows = 100_000
    for dtype in (torch.float32, torch.bfloat16):
        x, g = torch.randn(rows, 16).to(dtype), (torch.randn(rows, 16) + 1).to(dtype)
        w, b = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
        got = torch.autograd.grad(fasttx.layer_norm(x, weight=w, bias=b, backend="cpu"), (w, b), g)
        wide = [t.detach().double().requires_grad_() for t in (w, b)]
        out = F.layer_norm(x.double(), (16,), *wide)
        want = torch.autograd.grad(out, wide, g.double())
        # Sums of 10^5 values near 1: 1e-6 of 10^5 is a few fp32 roundings of the result.
        torch.testing.assert_close(got[0].double(), want[0], rtol=2e-6, atol=2e-3)
        torch.testing.assert_close(got[1].double(), want[1], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_the_cache_holds(dtype):
    """Outputs stored past the cache, inputs fetched ahead: the bits of the same rows alone."""
    x, residual = torch.randn(2, 9001, 768).to(dtype)
    weight, bias = torch.randn(2, 768).to(dtype)
    wide = fasttx.add_norm(x, residual, weight=weight, bias=bias)
    for rows in (slice(0, 40), slice(4500, 4540), slice(8980, 9001)):
        some = fasttx.add_norm(x[rows], residual[rows], weight=weight, bias=bias)
        assert torch.equal(wide[rows], some)


@pytest.mark.parametrize("N", [*range(1, 70), 127, 128, 129, 255, 4095, 4096, 4097])
def test_every_width(N):
    skip_unusable("add_norm_fwd", "cpu")
    x, r = torch.randn(6, N), torch.randn(6, N)
    for rows in (1, 4, 6):
        leaves = [x[:rows].clone().requires_grad_(), r[:rows].clone().requires_grad_()]
        with guarded_outputs():
            out = fasttx.add_norm(*leaves, weight=None, backend="cpu")
            grads = torch.autograd.grad(out, leaves, r[:rows])
        wide = [t.detach().double().requires_grad_() for t in leaves]
        gold = F.layer_norm(wide[0] + wide[1], (N,))
        expected = torch.autograd.grad(gold, wide, r[:rows].double())
        torch.testing.assert_close(out.double(), gold, atol=1e-5, rtol=1e-5)
        if N > 2:  # rstd is 1 / sqrt(eps) for one column, and any size for two
            torch.testing.assert_close(grads[0].double(), expected[0], atol=1e-4, rtol=1e-4)


def test_nothing_depends_on_threads_or_the_run():
    x, r = torch.randn(4000, 96).bfloat16(), torch.randn(4000, 96).bfloat16()
    w, results, before = torch.randn(96), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, r, w, w, w)]
            tensors = dict(zip(NAMES, leaves, strict=True))
            out = fasttx.add_norm(**tensors, dropout_p=0.1, seed=3)
            results.append([out, *torch.autograd.grad(out, leaves, x)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(backend, bad):
    x = torch.randn(5, 40)
    x[2, 7] = bad
    out = fasttx.layer_norm(x, backend=backend)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()


def test_mean_far_from_zero(backend):
    """The variance is of differences from the mean, not a difference of squares."""
    x = torch.randn(4, 300) + 3000
    gold = F.layer_norm(x.double(), (300,))
    got = fasttx.layer_norm(x, backend=backend)
    assert (got - gold).abs().max() < 2 * (F.layer_norm(x, (300,)) - gold).abs().max() + 1e-3


def test_autocast_gives_what_torch_gives():
    x, w = torch.randn(3, 8), torch.ones(8)
    for xd in (torch.float32, torch.bfloat16):
        for rd in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = fasttx.add_norm(x.to(xd), x.to(rd), weight=w)
                want = F.layer_norm(x.to(xd) + x.to(rd), (8,), w)
            assert got.dtype is want.dtype
    from fasttx.ops.add_norm import add_norm_fwd

    outputs = add_norm_fwd(
        x.bfloat16(), None, w, w, None, None, 1e-5, 0.0, False, True, True, backend="cpu"
    )
    assert [t.dtype for t in outputs] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(outputs[0], F.layer_norm(x.bfloat16().float(), (8,), w, w))


@pytest.mark.parametrize("name", ["everything", "residual", "transposed", "no rows"])
def test_opcheck_and_fake(name):
    case = BY_NAME[name]
    with recorded_calls() as calls:
        leaves = {n: t.float().requires_grad_() for n, t in case.inputs().items()}
        out = case.function(None)(**leaves)
        (out if isinstance(out, Tensor) else out[0] + out[1]).sum().backward()
    assert [op.name for op, _, _ in calls] == ["add_norm_fwd", "add_norm_bwd"]
    for op, args, _ in calls:
        opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def full(x, r, w, b, x_bias):
        out, total = fasttx.add_norm(
            x, r, weight=w, bias=b, x_bias=x_bias, dropout_p=0.2, seed=3, prenorm=True
        )
        return fasttx.rms_norm(out, weight=w) + total

    def arguments(rows):
        leaves = [torch.randn(rows, 24, requires_grad=True) for _ in range(2)]
        return leaves + [torch.randn(24, requires_grad=True) for _ in range(3)]

    check_compiled(full, arguments, dynamic)


def test_more_than_32_bit_offsets():
    """A row 2^31 elements after the first one: a stride, not memory."""
    skip_unusable("add_norm_fwd", "cpu")
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.float16)  # touched only where rows lie
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    x = memory.as_strided((2, 40), (2**31, 1))
    x.copy_(torch.randn(2, 40))
    expected = fasttx.layer_norm(x.clone(), backend="cpu")
    assert torch.equal(fasttx.layer_norm(x, backend="cpu"), expected)


X = torch.randn(2, 6, 8)
BAD = {
    "x type": (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    "x dtype": (TypeError, "x must be float32, .* got int64", {"x": X.long()}),
    "x scalar": (ValueError, "x must have at least 1 dimension, got a scalar", {"x": X[0, 0, 0]}),
    "residual type": (TypeError, "residual must be a tensor, got float", {"residual": 1.0}),
    "residual dtype": (TypeError, "residual must be float32, .* got bool", {"residual": X > 0}),
    "residual shape": (ValueError, r"residual must have x's shape \(2, 6, 8\), got \(6, 8\)", {"residual": X[0]}),
    "residual device": (ValueError, "residual must be on x's device cpu, got meta", {"residual": X.to("meta")}),
    "residual double": (TypeError, "residual must be float64 exactly where x is, got float64 beside float32", {"residual": X.double()}),
    "weight type": (TypeError, "weight must be a tensor, got int", {"weight": 1}),
    "weight shape": (ValueError, r"weight must have shape \(8,\), got \(7,\)", {"weight": torch.ones(7)}),
    "weight rank": (ValueError, r"weight must have shape \(8,\), got \(1, 8\)", {"weight": torch.ones(1, 8)}),
    "weight dtype": (TypeError, "weight must be float32, .* got int64", {"weight": torch.ones(8).long()}),
    "weight device": (ValueError, "weight must be on x's device cpu, got meta", {"weight": torch.ones(8, device="meta")}),
    "bias shape": (ValueError, r"bias must have shape \(8,\), got \(\)", {"bias": torch.tensor(1.0)}),
    "x_bias shape": (ValueError, r"x_bias must have shape \(8,\), got \(6, 8\)", {"x_bias": X[0]}),
    "dropout 1": (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
    "dropout negative": (ValueError, r"dropout_p must be in \[0, 1\), got -0.5", {"dropout_p": -0.5}),
    "dropout type": (TypeError, r"dropout_p must be in \[0, 1\), got '0'", {"dropout_p": "0"}),
    "eps negative": (ValueError, "eps must be a finite number of at least 0, got -1e-05", {"eps": -1e-5}),
    "eps nan": (ValueError, "eps must be a finite number of at least 0, got nan", {"eps": float("nan")}),
    "eps type": (TypeError, "eps must be a finite number of at least 0, got None", {"eps": None}),
    "kind": (ValueError, "kind must be 'layer' or 'rms', got 'batch'", {"kind": "batch"}),
    "seed type": (ValueError, "seed must be a 64-bit int.*got 'x'", {"seed": "x", "dropout_p": 0.1}),
    "seed tensor": (ValueError, r"seed must be an int64 tensor of one element, got float32 \(2,\)", {"seed": torch.zeros(2), "dropout_p": 0.1}),
    "seed device": (ValueError, "seed must be on x's device cpu, got meta", {"seed": torch.zeros(1, dtype=torch.int64, device="meta"), "dropout_p": 0.1}),
    "backend": (ValueError, "backend must be None or one of cpu, cuda, triton, reference, torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(monkeypatch, fasttx.add_norm, BAD[name], x=X, weight=torch.ones(8))


def test_unsupported_lists_every_reason():
    with pytest.raises(NotImplementedError, match=r"cpu: needs float32.*got float64"):
        fasttx.layer_norm(X.double(), backend="cpu")
