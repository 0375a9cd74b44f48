"""linear_cross_entropy on every backend and dtype against fp64, in the one harness."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fasttx
from fasttx.ops import _linear_cross_entropy as walk
from fasttx.ops import _linear_cross_entropy_classes as classes
from fasttx.ops.linear_cross_entropy import linear_cross_entropy_slope
from fasttx.testing import check, guarded_outputs, recorded_calls
from tests.ops.contract import DTYPES, backend_fixture, parameter, skip_unusable
from tests.ops.test_cross_entropy import BACKENDS
from tests.ops.test_cross_entropy import plain as cross_entropy_of

REDUCTIONS = ("mean", "sum", "none")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.linear_cross_entropy runs on the plain"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


backend = backend_fixture("linear_cross_entropy_fwd", BACKENDS)


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows a chunk, so that small problems take several."""
    monkeypatch.setattr(walk, "_budget", lambda rows, V: 3 * V * 4)


@pytest.fixture
def by_classes(monkeypatch, small_chunks):
    """The CPU's walk over classes, however few the rows."""
    skip_unusable("linear_cross_entropy_fwd", "cpu")
    monkeypatch.setattr(classes, "ROWS", 1)


def problem(rows, V, K, ignored=0.2):
    inputs = {
        "x": torch.randn(*rows, K, dtype=torch.float64),
        "weight": torch.randn(V, K, dtype=torch.float64),
        "bias": torch.randn(V, dtype=torch.float64),
    }
    target = torch.randint(0, V, rows)
    target[torch.rand(rows) < ignored] = -100
    return inputs, target


def plain(x, weight, target, bias=None, class_weight=None, **options):
    return cross_entropy_of(F.linear(x, weight, bias), target, class_weight, **options)


CASES = {
    "plain": ((11,), 40, 8, {}),
    "no bias": ((11,), 40, 8, {"bias": False}),
    "one": ((1,), 1, 1, {}),
    "no row": ((0,), 4, 3, {"reduction": "sum"}),
    "sum": ((2, 5), 33, 16, {"reduction": "sum", "label_smoothing": 0.1}),
    "none": ((2, 5), 33, 16, {"reduction": "none", "dout": "strided"}),
    "none, one gradient": ((9,), 33, 16, {"reduction": "none", "dout": "expanded"}),
    "everything": ((12,), 65, 7, {"label_smoothing": 0.2, "z_loss": 0.01, "class_weight": True}),
    "everything, none": (
        (12,), 65, 7,
        {"label_smoothing": 0.2, "z_loss": 0.01, "class_weight": True, "reduction": "none"},
    ),
    "strided": ((3, 4), 20, 9, {"layouts": {"x": "sliced", "weight": "transposed"}}),
}  # fmt: skip


def _selected():
    for backend, name, dtype in itertools.product(BACKENDS, CASES, DTYPES):
        slow = backend == "triton" and (dtype is torch.float16 or "layouts" in CASES[name][3])
        yield parameter(backend, dtype, name, slow=slow)


@pytest.mark.parametrize(("name", "dtype", "case"), list(_selected()))
def test_against_fp64(name, dtype, case, small_chunks):
    skip_unusable("linear_cross_entropy_fwd", name)
    _check_case(name, dtype, *CASES[case])


# Several blocks of classes; more rows than columns, and fewer.
LARGE = {
    "blocks": ((520,), 1100, 40, {"label_smoothing": 0.1, "class_weight": True, "z_loss": 0.01}),
    "columns": ((67,), 530, 90, {"layouts": {"x": "sliced", "weight": "transposed"}}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_by_classes_against_fp64(dtype, case, by_classes):
    _check_case("cpu", dtype, *{**CASES, **LARGE}[case])


def _check_case(backend, dtype, rows, V, K, options):
    options = dict(options)
    inputs, target = problem(rows, V, K)
    if not options.pop("bias", True):
        del inputs["bias"]
    layouts = {"dout": options.pop("dout", "contiguous"), **options.pop("layouts", {})}
    if options.pop("class_weight", False):
        options["class_weight"] = torch.rand(V) + 0.1

    def ours(**inputs):
        return fasttx.linear_cross_entropy(target=target, **inputs, **options, backend=backend)

    def gold(**inputs):
        return plain(target=target, **inputs, **options)

    if backend == "torch" and options.get("z_loss"):
        with pytest.raises(NotImplementedError, match="torch: does not support z_loss"):
            ours(**{n: t.to(dtype) for n, t in inputs.items()})
        return
    check(ours, gold, gold, inputs, dtype=dtype, wanted=tuple(inputs), layouts=layouts)


@pytest.mark.parametrize("rows", [classes.ROWS, 1])
@pytest.mark.parametrize("need", range(1, 8))
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_subset_of_gradients(need, dtype, rows, small_chunks, monkeypatch):
    skip_unusable("linear_cross_entropy_fwd", "cpu")
    monkeypatch.setattr(classes, "ROWS", rows)
    inputs, target = problem((8,), 30, 6)
    wanted = tuple(n for i, n in enumerate(inputs) if need >> i & 1)

    def ours(**inputs):
        return fasttx.linear_cross_entropy(target=target, **inputs, backend="cpu")

    def gold(**inputs):
        return plain(target=target, **inputs)

    check(ours, gold, gold, inputs, dtype=dtype, wanted=wanted)


def test_gradcheck():
    inputs, target = problem((5,), 6, 3)
    leaves = [t.requires_grad_() for t in inputs.values()]
    for reduction in ("mean", "none"):

        def function(x, weight, bias, reduction=reduction):
            return fasttx.linear_cross_entropy(
                x, weight, target, bias, label_smoothing=0.1, z_loss=0.1, reduction=reduction
            )

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_backward_and_upstream(backend, reduction, small_chunks):
    """The first backward hands out the forward's gradients, a second one computes its own."""
    inputs, target = problem((8,), 12, 5, ignored=0.3)
    leaves = [t.float().requires_grad_() for t in inputs.values()]
    options = {"reduction": reduction, "backend": backend}
    loss = fasttx.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], **options)
    expected = torch.autograd.grad(plain(leaves[0], leaves[1], target, leaves[2],
                                         reduction=reduction), leaves)  # fmt: skip
    for factor in (3.0, 1.0, -2.0):
        grads = torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=True)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want * factor, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_ignored(backend, reduction):
    """As in PyTorch: the mean is nan, gradients 0; NaN in an ignored row reaches nothing."""
    inputs, target = problem((4,), 12, 5, ignored=2)
    leaves = [t.float() for t in inputs.values()]
    leaves[0][:] = torch.nan
    leaves = [t.requires_grad_() for t in leaves]
    loss = fasttx.linear_cross_entropy(
        leaves[0], leaves[1], target, leaves[2], reduction=reduction, backend=backend
    )
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    for g in torch.autograd.grad(loss.sum(), leaves):
        assert (g == 0).all()


def test_ignored_rows_are_left_out(monkeypatch):
    skip_unusable("linear_cross_entropy_fwd", "cpu")
    inputs, target = problem((40,), 12, 5, ignored=0)
    target[6:] = -100
    x, weight, bias = (t.float().requires_grad_() for t in inputs.values())
    with recorded_calls() as calls:
        fasttx.linear_cross_entropy(x, weight, target, bias, backend="cpu")
    blocks = [args[0].shape for op, args, _ in calls if op is linear_cross_entropy_slope]
    assert blocks == [(6, 12)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_a_fraction_of_the_logits(dtype):
    """Beyond inputs and gradients at most an eighth of the float32 logits, as torch allocates."""
    skip_unusable("linear_cross_entropy_fwd", "cpu")
    M, V, K = 2048, 8192, 16
    inputs, target = problem((M,), V, K)
    leaves = [t.to(dtype).requires_grad_() for t in inputs.values()]
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = fasttx.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], backend="cpu")
        loss.backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    returned = sum(t.numel() * t.element_size() for t in leaves)
    assert 0 < peak - returned <= M * V * 4 / 8, (peak - returned) / (M * V * 4)


def test_return_logits(backend):
    inputs, target = problem((4,), 12, 5)
    x, weight, bias = (t.float().requires_grad_() for t in inputs.values())
    loss, logits = fasttx.linear_cross_entropy(
        x, weight, target, bias, return_logits=True, backend=backend
    )
    torch.testing.assert_close(logits, F.linear(x, weight, bias))
    torch.testing.assert_close(loss, plain(x, weight, target, bias))
    (loss + logits.sum()).backward()
    assert weight.grad is not None


def test_tiny_gradients_of_fp16_survive_the_loss_scale():
    inputs, target = problem((3000,), 8, 4, ignored=0)
    exact = [t.half().double().requires_grad_() for t in inputs.values()]
    loss = plain(exact[0], exact[1], target, exact[2]) * 65536
    expected = torch.autograd.grad(loss, exact)
    leaves = [t.half().requires_grad_() for t in inputs.values()]
    loss = fasttx.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2]) * 65536
    for got, want in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 4e-3, error


@pytest.mark.parametrize("rows", [classes.ROWS, 1000])
def test_deterministic(rows, small_chunks, monkeypatch):
    monkeypatch.setattr(classes, "ROWS", rows)
    inputs, target = problem((50,), 700, 16)
    found = []
    for _ in range(2):
        leaves = [t.float().requires_grad_() for t in inputs.values()]
        loss = fasttx.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2])
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_autocast():
    inputs, target = problem((4,), 12, 5)
    x, weight, bias = (t.float().requires_grad_() for t in inputs.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fasttx.linear_cross_entropy(x, weight, target, bias)
    assert loss.dtype is torch.float32
    expected = plain(*(t.bfloat16() for t in (x, weight)), target, bias.bfloat16())
    torch.testing.assert_close(loss, expected, atol=1e-2, rtol=1e-2)
    loss.backward()
    assert weight.grad.dtype is torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    inputs, target = problem((6,), 13, 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, weight, bias):
        return fasttx.linear_cross_entropy(x, weight, target, bias, reduction=reduction)

    a, b = ([t.float().requires_grad_() for t in inputs.values()] for _ in range(2))
    got, expected = step(*a), plain(b[0], b[1], target, b[2], reduction=reduction)
    torch.testing.assert_close(got, expected)
    up = torch.randn(got.shape)
    pairs = (torch.autograd.grad(o, t, up) for o, t in ((got, a), (expected, b)))
    for g, want in zip(*pairs, strict=True):
        torch.testing.assert_close(g, want, atol=1e-6, rtol=1e-5)


def test_opcheck():
    inputs, target = problem((4,), 9, 5)
    for reduction in ("mean", "none"):
        with recorded_calls() as calls:
            leaves = [t.float().requires_grad_() for t in inputs.values()]
            loss = fasttx.linear_cross_entropy(
                leaves[0], leaves[1], target, leaves[2], reduction=reduction
            )
            torch.autograd.grad(loss, leaves, torch.randn(loss.shape))
        for op, args, _ in calls:
            args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(op.overload, args, test_utils=tests)


def test_out_of_range_below_the_door(backend):
    """Where values cannot be checked, a bad target poisons its own row of dx."""
    from fasttx.ops.linear_cross_entropy import linear_cross_entropy_bwd

    x, weight = torch.randn(3, 4), torch.randn(6, 4)
    arguments = (x, weight, None, torch.tensor([1, 6, -1]), None, -100, 0, 0.0, 0.0, 1)
    with guarded_outputs():
        dx, _, _ = linear_cross_entropy_bwd(torch.ones(3), *arguments, backend=backend)
    assert dx.isnan().all(1).tolist() == [False, True, True]


X, WEIGHT, TARGET = torch.randn(2, 3), torch.randn(5, 3), torch.zeros(2, dtype=torch.long)
BAD = {
    "x no tensor": ({"x": 1}, TypeError, "x must be a tensor, got int"),
    "x int": ({"x": TARGET}, TypeError, "x must be float32.*got int64"),
    "x width": ({"x": X[:, :2]}, ValueError, r"x must be \[..., K\].*\(2, 2\) and \(5, 3\)"),
    "no class": ({"weight": WEIGHT[:0]}, ValueError, "V >= 1"),
    "weight dtype": ({"weight": WEIGHT.half()}, TypeError, "weight must have x's dtype float32"),
    "weight device": ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on x's device"),
    "bias shape": ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\)"),
    "bias dtype": ({"bias": torch.ones(5).double()}, TypeError, "bias must have x's dtype"),
    "target V": ({"target": TARGET + 5}, ValueError, r"\[0, 5\) .V=5 classes.*got 5"),
    "target shape": ({"target": TARGET[:1]}, ValueError, "target must have the shape"),
    "class weight": ({"class_weight": torch.ones(2)}, ValueError, "class_weight must have shape"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    "smoothing": ({"label_smoothing": -0.1}, ValueError, r"in \[0, 1\], got -0.1"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, text = BAD[name]
    with recorded_calls() as calls, pytest.raises(error, match=text):
        fasttx.linear_cross_entropy(**{"x": X, "weight": WEIGHT, "target": TARGET, **changed})
    assert not calls
