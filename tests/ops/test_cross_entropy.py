"""cross_entropy on every backend and dtype against fp64, in the one harness."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fasttx
from fasttx.ops.cross_entropy import (
    check_losses,
    cross_entropy_bwd,
    cross_entropy_fwd,
    cross_entropy_inplace,
    cross_entropy_rescale,
)
from fasttx.reference.cross_entropy import cross_entropy_math
from fasttx.testing import check, guarded_outputs, recorded_calls
from tests.conftest import unusable
from tests.ops import contract
from tests.ops.contract import DTYPES, backend_fixture, parameter, skip_unusable

BACKENDS = (*contract.BACKENDS, "torch")
REDUCTIONS = ("mean", "sum", "none")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.cross_entropy runs on the plain"),
    # NumPy's word for the infinities that the kernels mean to make.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


backend = backend_fixture("cross_entropy_fwd", BACKENDS)


def problem(rows, V, ignored=0.2, scale=3.0, shift=0.0, seed=0):
    """logits fp64 [*rows, V] and targets, some of them -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*rows, V, generator=generator, dtype=torch.float64) * scale + shift
    target = torch.randint(0, V, rows, generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = -100
    return logits, target


def plain(logits, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0,
          z_loss=0.0):  # fmt: skip
    """PyTorch's own, on float32 copies of 16-bit logits."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).movedim(-1, 1)
    weight = None if weight is None else weight.to(x.dtype)
    loss = F.cross_entropy(
        x, target, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    used = target != ignore_index
    z = torch.where(used, z_loss * torch.logsumexp(x, 1).square(), 0)
    if reduction != "none":
        z = z.sum() / (used.sum() if reduction == "mean" else 1)
    return loss + z if z_loss else loss


CASES = {
    "plain": ((9,), 100, {}),
    "one class": ((4,), 1, {}),
    "one row": ((1,), 3, {"label_smoothing": 0.3}),
    "no row": ((0,), 5, {"reduction": "sum"}),
    "no row, none": ((0,), 5, {"reduction": "none"}),
    "blocks and a tail": ((5,), 4099, {"label_smoothing": 0.1, "z_loss": 1e-2}),
    "sum": ((3, 5), 31, {"reduction": "sum"}),
    "none": ((3, 5), 33, {"reduction": "none", "z_loss": 0.1}),
    "smooth": ((6,), 65, {"label_smoothing": 0.2, "reduction": "none"}),
    "all smooth": ((6,), 64, {"label_smoothing": 1.0, "reduction": "sum"}),
    "z": ((6,), 17, {"z_loss": 0.05}),
    "weight": ((8,), 50, {"weight": True}),
    "weight, sum": ((8,), 50, {"weight": True, "reduction": "sum"}),
    "weight, everything": (
        (2, 4),
        70,
        {"weight": True, "label_smoothing": 0.15, "z_loss": 0.02, "reduction": "none"},
    ),
    "weight, mean, everything": (
        (2, 2, 3),
        19,
        {"weight": True, "label_smoothing": 0.15, "z_loss": 0.02},
    ),
    "ignore a class": ((20,), 7, {"ignore_index": 3, "label_smoothing": 0.1}),
    "transposed": ((4, 6), 37, {"layout": "transposed"}),
    "sliced": ((4, 6), 37, {"layout": "sliced", "reduction": "none"}),
    "strided": ((4, 6), 37, {"layout": "strided", "reduction": "none", "dout": "strided"}),
    "expanded": ((4, 6), 37, {"layout": "expanded", "reduction": "none", "dout": "expanded"}),
    "large logits": ((6,), 300, {"scale": 30.0, "shift": 500.0}),
    "rising logits": ((3,), 9000, {"rising": True}),
}


def _selected():
    for backend, name, dtype in itertools.product(BACKENDS, CASES, DTYPES):
        slow = backend == "triton" and (dtype is torch.float16 or CASES[name][1] > 1000)
        yield parameter(backend, dtype, name, slow=slow)


@pytest.mark.parametrize(("name", "dtype", "case"), list(_selected()))
def test_against_fp64(name, dtype, case):
    case = CASES[case]
    skip_unusable("cross_entropy_fwd", name)
    rows, V, options = case[0], case[1], dict(case[2])
    layout, dout = options.pop("layout", "contiguous"), options.pop("dout", "contiguous")
    logits, target = problem(
        rows, V, scale=options.pop("scale", 3.0), shift=options.pop("shift", 0.0),
        ignored=0.0 if "ignore_index" in options else 0.2,
    )  # fmt: skip
    if options.pop("rising", False):
        logits = logits + torch.arange(V) / 50
    if layout == "expanded":
        logits = logits[:1].expand(logits.shape).contiguous()
    weight = torch.rand(V, dtype=torch.float64) + 0.1 if options.pop("weight", False) else None

    def ours(logits, **more):
        arguments = {"weight": None if weight is None else weight.float(), "backend": name, **more}
        return fasttx.cross_entropy(logits, target, **options, **arguments)

    def gold(logits):
        kept = None if weight is None else weight.float().double()
        return plain(logits, target, kept, **options)

    if name == "torch" and options.get("z_loss"):
        with pytest.raises(NotImplementedError, match="torch: does not support z_loss"):
            ours(logits.to(dtype))
        return
    layouts = {"logits": layout, "dout": dout}
    arguments = {"dtype": dtype, "wanted": ("logits",), "layouts": layouts}
    check(ours, gold, gold, {"logits": logits}, **arguments)
    if layout != "expanded" and name != "torch":
        x = logits.to(dtype)
        with guarded_outputs():
            first, second = (x.clone().requires_grad_() for _ in range(2))
            out, inplace = ours(first), ours(second, inplace_grad=True)
            up = torch.randn(out.shape)
            assert torch.equal(out, inplace) or dtype is torch.float16 or out.isnan().all()
            (a,) = torch.autograd.grad(out, first, up)
            (b,) = torch.autograd.grad(inplace, second, up)
        # The gradient is rounded before and after it is scaled by the upstream gradient.
        eps = torch.finfo(dtype).eps
        scale = a.float().abs().max().item() if a.numel() else 0.0
        torch.testing.assert_close(a.float(), b.float(), atol=2 * eps * scale, rtol=2 * eps)
        if b.numel():
            assert b.data_ptr() == second.data_ptr()


def test_reference_is_torch():
    """The authority itself, against F.cross_entropy with its classes in dimension 1, in fp64."""
    logits, target = problem((3, 4, 2), 11)
    weight = torch.rand(11, dtype=torch.float64)
    for reduction, smooth in itertools.product(REDUCTIONS, (0.0, 0.1)):
        expected = F.cross_entropy(
            logits.movedim(-1, 1), target, weight, reduction=reduction, label_smoothing=smooth
        )
        got = fasttx.cross_entropy(
            logits, target, weight=weight, reduction=reduction, label_smoothing=smooth
        )
        torch.testing.assert_close(got, expected)
    single = logits[0, 0, 0]
    got = fasttx.cross_entropy(single, torch.tensor(4), backend="reference")
    torch.testing.assert_close(got, F.cross_entropy(single, torch.tensor(4)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    logits, target = problem((2, 3), 5)
    weight = torch.rand(5, dtype=torch.float64)

    def function(x):
        return fasttx.cross_entropy(
            x, target, weight=weight, label_smoothing=0.1, z_loss=0.1, reduction=reduction
        )

    logits.requires_grad_()
    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_gradient_penalty(backend):
    """A loss on the gradient is right, not dropped."""
    logits, target = problem((4,), 9)

    def penalty(function, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    expected = penalty(lambda x: F.cross_entropy(x, target), logits)
    got = penalty(lambda x: fasttx.cross_entropy(x, target, backend=backend), logits.float())
    torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_everything_ignored(backend, reduction, inplace):
    """As in PyTorch: the mean is nan, gradients are 0, NaN in such a row reaches nothing."""
    logits = torch.full((3, 40), torch.nan, requires_grad=True)
    target = torch.full((3,), -100)
    options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
    options["z_loss"] = 0.0 if backend == "torch" else 0.1
    loss = fasttx.cross_entropy(logits, target, inplace_grad=inplace, **options)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    loss.sum().backward()
    assert (logits.grad == 0).all()


def test_infinities_as_torch(backend):
    """Hidden classes (-inf), a row of nothing else, +inf and NaN."""
    logits, target = problem((6,), 70, ignored=0)
    logits = logits.float()
    logits[0, target[0] != torch.arange(70)] = -torch.inf
    logits[1, :69] = -torch.inf
    target[1] = 3
    logits[2] = -torch.inf
    logits[3, 5] = torch.inf
    logits[4, 6] = torch.nan
    logits[5] = torch.finfo(torch.float32).min
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    expected = F.cross_entropy(a, target, reduction="none")
    got = fasttx.cross_entropy(b, target, reduction="none", backend=backend)
    torch.testing.assert_close(got, expected, equal_nan=True)
    (da,), (db,) = (torch.autograd.grad(o.sum(), t) for o, t in ((expected, a), (got, b)))
    torch.testing.assert_close(db, da, equal_nan=True)


def test_first_block_hidden(backend):
    """The running maximum starts among -inf, and rises far and often later."""
    logits = torch.arange(6000.0)[None].repeat(2, 1)
    logits[:, :4500] = -torch.inf
    target = torch.tensor([5999, 4500])
    got = fasttx.cross_entropy(logits, target, reduction="none", backend=backend)
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(got, expected.float())


def test_backends_follow_each_other(backend):
    """Any backend's backward follows any backend's forward: the residuals are part of the
    contract."""
    logits, target = problem((4, 5), 70)
    logits, weight = logits.float(), torch.rand(70)
    target, dloss, expected = target.reshape(-1), torch.tensor(0.7), {}
    for first, z_loss in itertools.product(BACKENDS, (0.0, 0.05)):
        if unusable("cross_entropy_fwd", first) or (z_loss and "torch" in (first, backend)):
            continue
        scalars = check_losses("mean", -100, 0.1, z_loss)
        _, *residuals = cross_entropy_fwd(logits, target, weight, *scalars, backend=first)
        arguments = (dloss, logits, target, weight, *residuals, *scalars)
        got = cross_entropy_bwd(*arguments, backend=backend)
        torch.testing.assert_close(got, expected.setdefault(z_loss, got), atol=1e-7, rtol=2e-5)


def test_in_place_is_consumed():
    logits, target = problem((4,), 9)
    logits = logits.float().requires_grad_()
    before = logits._version
    loss = fasttx.cross_entropy(logits, target, inplace_grad=True)
    assert logits._version > before
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_in_place_has_no_second_derivative():
    logits, target = problem((4,), 9)
    logits = logits.float().requires_grad_()
    loss = fasttx.cross_entropy(logits, target, inplace_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_in_place_and_another_reader():
    """What saved the logits before them notices; what changes them afterwards is noticed."""
    logits, target = problem((4,), 9)
    leaf = logits.float().requires_grad_()
    hidden = leaf.exp()
    fasttx.cross_entropy(hidden, target, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()
    hidden = leaf * 2
    loss = fasttx.cross_entropy(hidden, target, inplace_grad=True)
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="changed before the backward"):
        loss.backward()


def test_in_place_of_what_needs_no_gradient_changes_nothing():
    logits, target = problem((4,), 9)
    logits, copy = logits.float(), logits.float()
    fasttx.cross_entropy(logits, target, inplace_grad=True)
    with torch.no_grad():
        fasttx.cross_entropy(logits.requires_grad_(), target, inplace_grad=True)
    assert torch.equal(logits, copy)
    wide = logits[:1].expand(4, 9)
    with pytest.raises(ValueError, match="inplace_grad needs logits with memory of their own"):
        fasttx.cross_entropy(wide, target, inplace_grad=True)


def test_in_place_of_shifted_logits(backend):
    """A causal model's logits[:, :-1]: the gradient of the whole, last position included."""
    logits, target = problem((2, 6), 40)
    target[:, 0] = 1
    whole, other = (logits.float().requires_grad_() for _ in range(2))
    base = whole * 1
    loss = fasttx.cross_entropy(base[:, :-1], target[:, 1:], inplace_grad=True, backend=backend)
    (3 * loss).backward()
    (3 * F.cross_entropy(other[:, :-1].flatten(0, 1), target[:, 1:].flatten())).backward()
    torch.testing.assert_close(whole.grad, other.grad)


def test_tiny_gradients_of_fp16_survive_the_loss_scale():
    """The mean over many rows, scaled up as by a gradient scaler: in place and not."""
    logits, target = problem((4000,), 8, ignored=0, scale=0.1)
    exact = logits.half().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(exact, target) * 65536, exact)
    for inplace in (False, True):
        x = logits.half().requires_grad_()
        loss = fasttx.cross_entropy(x, target, inplace_grad=inplace) * 65536
        (got,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=2e-3)


def test_deterministic_on_any_number_of_threads():
    skip_unusable("cross_entropy_fwd", "cpu")
    logits, target = problem((60,), 1500)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = logits.float().requires_grad_()
            loss = fasttx.cross_entropy(x, target, label_smoothing=0.1, backend="cpu")
            found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("op", [fasttx.cross_entropy, fasttx.linear_cross_entropy])
def test_targets_with_gaps_in_memory(op):
    x, both = torch.randn(9, 13), torch.randint(0, 13, (9, 2))
    arguments = (x,) if op is fasttx.cross_entropy else (x, torch.randn(13, 13))
    gaps, dense = (op(*arguments, t) for t in (both[:, 1], both[:, 1].contiguous()))
    assert torch.equal(gaps, dense)


def test_many_short_rows():
    """More rows than one item of work, on the native kernel."""
    skip_unusable("cross_entropy_fwd", "cpu")
    logits, target = problem((20000,), 3)
    x, exact = logits.float().requires_grad_(), logits.float().double().requires_grad_()
    loss, gold = fasttx.cross_entropy(x, target), F.cross_entropy(exact, target)
    torch.testing.assert_close(loss.double(), gold, atol=1e-6, rtol=1e-6)
    (dx,), (dexact,) = (torch.autograd.grad(o, t) for o, t in ((loss, x), (gold, exact)))
    torch.testing.assert_close(dx.double(), dexact, atol=1e-10, rtol=1e-5)


@pytest.mark.slow
def test_more_elements_than_2_31():
    """Every row of one shared memory: offsets of rows past 2^31 elements."""
    skip_unusable("cross_entropy_fwd", "cpu")
    V, rows = 65536, 33000
    storage = torch.randn(V + rows).bfloat16()
    logits = storage.as_strided((rows, V), (1, 1))
    far = torch.empty(2**31 + 2 * V, dtype=torch.bfloat16).as_strided((2, V), (2**31, 1))
    far.copy_(logits[:2])
    target = torch.randint(0, V, (2,))
    got = fasttx.cross_entropy(far, target, reduction="none", backend="cpu")
    expected = F.cross_entropy(logits[:2].float(), target, reduction="none")
    torch.testing.assert_close(got, expected)


def _calls(**options):
    logits, target = problem((2, 3), 9)
    with recorded_calls() as calls:
        x = logits.float().requires_grad_()
        loss = fasttx.cross_entropy(x, target, weight=torch.rand(9), **options)
        torch.autograd.grad(loss, x, torch.randn(loss.shape))
    return calls


@pytest.mark.parametrize("options", [
    {"reduction": "none"},
    {"label_smoothing": 0.1, "z_loss": 0.1},
    {"reduction": "sum", "inplace_grad": True},
])  # fmt: skip
def test_opcheck(options):
    calls = _calls(**options)
    assert len(calls) == 2
    for op, args, _ in calls:
        args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.overload, args, test_utils=tests)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_fullgraph(inplace):
    logits, target = problem((4,), 33)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return fasttx.cross_entropy(
            x * 2, target, label_smoothing=0.1, reduction="sum", inplace_grad=inplace
        )

    a, b = (logits.float().requires_grad_() for _ in range(2))
    got = step(a)
    expected = F.cross_entropy(b * 2, target, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(got, expected)
    (da,), (db,) = (torch.autograd.grad(o, t) for o, t in ((got, a), (expected, b)))
    torch.testing.assert_close(da, db)


def test_inner_op_wants_the_door():
    x = torch.randn(1, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"call fasttx\.cross_entropy"):
        cross_entropy_fwd(x, torch.zeros(2, dtype=torch.long), None, -100, 1, 0.0, 0.0)


def test_out_of_range_below_the_door(backend):
    """Where values cannot be checked, a bad target poisons its row and touches nothing else."""
    logits, _ = problem((4,), 30)
    x = logits.float()[None]
    target = torch.tensor([2, 30, -1, 2**62])
    scalars = check_losses("none", -100, 0.0, 0.0)
    with guarded_outputs():
        loss, *residuals = cross_entropy_fwd(x, target, None, *scalars, backend=backend)
        dx = cross_entropy_bwd(
            torch.ones(4), x, target, None, *residuals, *scalars, backend=backend
        )
    assert loss.isnan().tolist() == [False, True, True, True]
    assert dx[0].isnan().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_rescale_leaves_ignored_rows(backend):
    skip_unusable("cross_entropy_rescale", backend)
    grad = torch.zeros(1, 3, 5)
    grad[0, 1:] = 1
    target = torch.tensor([-100, 0, 1])
    arguments = (torch.tensor([torch.inf, 2.0, 1.0]), torch.tensor(3.0), target, -100)
    cross_entropy_rescale(grad, *arguments, backend=backend)
    assert torch.equal(grad[0, :, 0], torch.tensor([0.0, 6.0, 3.0]))


def test_inplace_op_returns_one_factor():
    logits, target = problem((4,), 9, ignored=0)
    for dtype, expected in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 0.25)):
        _, factor = cross_entropy_inplace(
            logits.to(dtype)[None], target, None, *check_losses("mean", -100, 0.0, 0.0)
        )
        assert factor.item() == expected


def test_math_returns_what_the_op_returns():
    logits, target = problem((4,), 9)
    found = cross_entropy_math(logits, target, None, *check_losses("none", -100, 0.0, 0.0))
    allocated = cross_entropy_fwd.alloc(logits[None], target, None, -100, 0, 0.0, 0.0)
    assert [t.shape for t in found] == [t.shape for t in allocated]


LOGITS, TARGET = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
BAD = {
    "logits no tensor": ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
    "logits int": ({"logits": TARGET}, TypeError, "logits must be float32.*got int64"),
    "logits scalar": ({"logits": torch.tensor(1.0)}, ValueError, r"logits must be \[..., V\]"),
    "no class": ({"logits": torch.empty(2, 3, 0)}, ValueError, "V >= 1"),
    "target list": ({"target": [0]}, TypeError, "target must be a tensor"),
    "probabilities": ({"target": LOGITS}, TypeError, "class indices .integers., got float32"),
    "target bool": ({"target": TARGET.bool()}, TypeError, "class indices"),
    "target shape": ({"target": TARGET[0]}, ValueError, r"shape \(2, 3\).*last.*got \(3,\)"),
    "dimension 1": (
        {"logits": LOGITS.movedim(-1, 1)}, ValueError, "the class dimension is the last",
    ),
    "target V": ({"target": TARGET + 5}, ValueError, r"\[0, 5\) .V=5 classes.*got 5"),
    "target -1": ({"target": TARGET - 1}, ValueError, "ignore_index=-100, got -1"),
    "target -100": ({"target": TARGET - 100, "ignore_index": 0}, ValueError, "got -100"),
    "target max": ({"target": TARGET + (2**63 - 1)}, ValueError, "got 9223372036854775807"),
    "target meta": ({"target": TARGET.to("meta")}, ValueError, "on the logits' device cpu"),
    "weight shape": ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(5,\)"),
    "weight int": ({"weight": torch.ones(5).long()}, TypeError, "weight must be float32"),
    "weight grad": (
        {"weight": torch.ones(5, requires_grad=True)}, ValueError, "weight must not require grad",
    ),
    "reduction": ({"reduction": "batchmean"}, ValueError, "none, mean, sum, got 'batchmean'"),
    "smoothing high": ({"label_smoothing": 1.1}, ValueError, r"in \[0, 1\], got 1.1"),
    "smoothing nan": ({"label_smoothing": float("nan")}, ValueError, "got nan"),
    "smoothing text": ({"label_smoothing": "a"}, TypeError, "label_smoothing must be"),
    "z": ({"z_loss": -1.0}, ValueError, "z_loss must be finite and at least 0, got -1.0"),
    "z inf": ({"z_loss": float("inf")}, ValueError, "z_loss must be finite"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend must be None or one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, text = BAD[name]
    with recorded_calls() as calls, pytest.raises(error, match=text):
        fasttx.cross_entropy(**{"logits": LOGITS, "target": TARGET, **changed})
    assert not calls


def test_float64_has_no_fast_kernel():
    with pytest.raises(NotImplementedError, match="needs float32"):
        fasttx.cross_entropy(LOGITS.double(), TARGET, backend="cpu")


def test_torch_takes_the_ordinary_way_in_place():
    x, y = (LOGITS.clone().requires_grad_() for _ in range(2))
    for t, inplace in ((x, True), (y, False)):
        fasttx.cross_entropy(t, TARGET, inplace_grad=inplace, backend="torch").backward()
    assert torch.equal(x, LOGITS)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)
