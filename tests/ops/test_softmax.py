"""softmax and log_softmax on every backend and dtype against fp64, in the one harness."""
# ruff: noqa: E501 (tables, one case a line)

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import fasttx
from fasttx.ops.softmax import log_softmax, softmax, softmax_fwd
from fasttx.reference.softmax import softmax_math
from fasttx.testing import check, guarded_outputs, recorded_calls
from tests.ops.contract import (
    BACKENDS,
    DTYPES,
    backend_fixture,
    check_compiled,
    every_case,
    opcheck,
    refused,
    skip_unusable,
    unless_quick,
)

CAUSAL = {False: (False, False), True: (True, False), "lower_right": (True, True)}
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.softmax runs on the plain"),
    # NumPy's word for inf - inf under the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


def holes(*shape) -> Tensor:
    """bool mask with a few rows that see nothing."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.4
    mask[..., 1::4, :] = False
    return mask


def additive(*shape) -> Tensor:
    """float mask with exact -inf holes and finite minima, which are only numbers."""
    generator = torch.Generator().manual_seed(6)
    mask = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = mask.masked_fill(torch.rand(shape, generator=generator) > 0.8, -torch.inf)
    return mask.masked_fill(torch.rand(shape, generator=generator) > 0.9, -1e4)


@dataclass
class Case:
    """shape of x; a mask; options of the door."""

    name: str
    shape: tuple
    mask: Tensor | None = None
    options: dict = field(default_factory=dict)
    layouts: dict = field(default_factory=dict)
    log: bool = False
    keep: tuple = ()
    quick: bool = False
    wide: bool = False
    x: float = 1.0

    @property
    def wanted(self) -> tuple:
        return ("x", "mask") if self.mask is not None and self.mask.is_floating_point() else ("x",)

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(len(self.name))
        x = self.x * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return {"x": x} if self.mask is None else {"x": x, "mask": self.mask}

    def function(self, backend: str | None, compute: torch.dtype | None = None):
        def call(x, mask=None):
            if compute is None:
                door = log_softmax if self.log else softmax
                return door(x, mask=mask, **self.options, backend=backend)
            o = {"scale": 1.0, "is_causal": False, "dim": -1, **self.options}
            if mask is not None:
                mask = mask[(None,) * (x.dim() - mask.dim())].movedim(o["dim"], -1)
            y = softmax_math(
                x.movedim(o["dim"], -1), mask, o["scale"], *CAUSAL[o["is_causal"]], self.log, False,
                compute=compute,
            )  # fmt: skip
            return y.movedim(-1, o["dim"])

        return call


HALF = {"scale": 0.125}
CASES = [
    Case("plain", (5, 3, 33), quick=True),
    Case("scale and float mask", (2, 3, 9, 35), additive(2, 1, 1, 35), HALF, quick=True),
    Case("log, bool mask", (2, 3, 9, 21), holes(9, 21), {"scale": 2.0}, log=True, quick=True),
    Case("middle dimension", (3, 20, 9), additive(3, 20, 1), {"dim": 1}, quick=True),
    Case("log", (4, 37), log=True),
    Case("one row", (300,)),
    Case("one column", (5, 1)),
    Case("log, one column", (5, 1), log=True),
    Case("one number", (1, 1, 1), additive(1, 1, 1)),
    Case("no rows", (0, 12), torch.zeros(12)),
    Case("no columns", (3, 0), torch.zeros(3, 0)),
    Case("log, no columns", (3, 0), log=True),
    Case("wide", (3, 9001), additive(9001)),
    Case("wider than a block", (2, 270_001), options={"scale": 1.5}, wide=True),
    Case("log, wider than a block", (1, 270_001), additive(270_001), log=True, wide=True),
    Case("many rows", (1111, 40), additive(40)),
    Case("causal", (2, 31, 31), options={"is_causal": True, **HALF}),
    Case("lower right, S < T", (2, 3, 9, 21), additive(2, 1, 9, 21), {"is_causal": "lower_right"}),
    Case("lower right, S > T", (2, 21, 9), None, {"is_causal": "lower_right"}, log=True),
    Case("causal down a column", (2, 17, 40), None, {"is_causal": True, "dim": 1}),
    Case("bool mask", (2, 3, 9, 21), holes(2, 1, 9, 21), HALF),
    Case("bool mask of keys", (2, 3, 9, 21), torch.arange(21) < torch.tensor([15, 0])[:, None, None, None]),
    Case("bool mask of rows", (3, 9, 21), holes(3, 9, 21)[..., :1]),
    Case("float mask, whole", (2, 3, 9, 21), additive(2, 3, 9, 21)),
    Case("float mask [S, T]", (2, 3, 9, 21), additive(9, 21)),
    Case("float mask [H, 1, T]", (2, 3, 9, 21), additive(3, 1, 21), log=True),
    Case("float mask [B, 1, S, 1]", (2, 3, 9, 21), additive(2, 1, 9, 1)),
    Case("float mask of one number", (2, 3, 9, 21), torch.ones(1, 1, 1, 1, dtype=torch.float64)),
    Case("float mask in fp32", (2, 3, 9, 21), additive(2, 1, 9, 21).float(), keep=("mask",)),
    Case("rows of finite minima", (4, 21), torch.full((4, 21), torch.finfo(torch.float32).min), keep=("mask",)),
    Case("negative scale", (4, 50), None, {"scale": -0.7}),
    Case("scale 0", (4, 50), None, {"scale": 0.0}),
    Case("large logits", (6, 70), None, {"scale": 30.0}, x=8),
    Case("log of large logits", (6, 70), None, {"scale": 30.0}, x=8, log=True),
    Case("first dimension", (40, 70), additive(1, 70), {"dim": 0}),
    Case("log, first of four", (20, 2, 3, 70), holes(20, 2, 1, 1), {"dim": 0, "scale": 0.5}, log=True),
    Case("first dimension, wide", (1500, 9), None, {"dim": -2}),
    Case("transposed", (3, 25, 24), additive(3, 1, 24), {}, {"x": "transposed", "dout": "transposed", "mask": "sliced"}),
    Case("strided", (3, 5, 24), additive(1, 5, 24), {}, {"x": "strided", "dout": "strided", "mask": "strided"}),
    Case("sliced", (2, 3, 5, 24), holes(2, 1, 5, 24), {}, {"x": "sliced", "dout": "sliced", "mask": "transposed"}),
    Case("middle dimension, sliced", (3, 20, 9), None, {"dim": 1}, {"x": "sliced", "dout": "transposed"}),
    Case("expanded", (4, 4, 24), additive(4, 24), {}, {"dout": "expanded"}),
    Case("five dimensions", (2, 2, 1, 3, 20), additive(2, 1, 1, 3, 20), HALF),
    Case("five dimensions, second", (2, 21, 2, 3, 4), additive(21, 1, 1, 4), {"dim": 1}),
]  # fmt: skip
BY_NAME = {c.name: c for c in CASES}


backend = backend_fixture("softmax_fwd")


def _slow(backend, case, dtype):
    wide = case.wide and (backend == "reference" or dtype is torch.float16)
    return wide or unless_quick(backend, case, dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "case"), list(every_case(CASES, _slow, (*BACKENDS, "torch")))
)
def test_against_fp64(name: str, dtype: torch.dtype, case: Case):
    skip_unusable("softmax_fwd", name)
    if name == "torch" and (case.mask is not None or "is_causal" in case.options):
        inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in case.inputs().items()}
        with pytest.raises(NotImplementedError, match="torch: does not support"):
            case.function(name)(**inputs)
        return
    gold = case.function(None, compute=torch.float64)
    # The reference, too, has every backend's residual: a gradient from a rounded result.
    plain = (case.function(None, compute=dtype), case.function("reference"))
    check(
        case.function(name), gold, plain, case.inputs(), dtype=dtype, wanted=case.wanted,
        keep=case.keep, layouts=case.layouts,
    )  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
def test_gradients_to_second_order(log):
    door = log_softmax if log else softmax
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = additive(3, 4)
    mask[0] = -torch.inf

    def function(x, mask):
        y = door(x, scale=0.7, mask=mask, is_causal="lower_right")
        return y.masked_fill(y == -torch.inf, 0)

    finite = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(function, (x, finite))
    torch.autograd.gradgradcheck(function, (x, finite))
    torch.autograd.gradgradcheck(lambda x: function(x, mask), (x,))


@pytest.mark.parametrize("log", [False, True])
def test_gradient_penalty(backend, log):
    door = log_softmax if log else softmax
    results = []
    for name in (backend, None):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 5, generator=generator).requires_grad_()
        m = torch.ones(5).requires_grad_()
        plain = torch.log_softmax if log else torch.softmax
        y = door(x, mask=m, backend=name) if name else plain(x.double() + m, -1)
        (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), (x, m)))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


def test_any_backward_follows_any_forward():
    x = torch.randn(2, 5, 40)
    m, g = additive(1, 5, 40).float(), torch.randn(2, 5, 40)
    args = (0.5, True, False)
    from fasttx.ops.softmax import softmax_bwd

    for log in (False, True):
        outs = [softmax_fwd(x, m, *args, log, False, backend=b) for b in BACKENDS]
        for out in outs:
            found = [softmax_bwd(g, out, x, m, *args, log, 3, backend=b) for b in BACKENDS]
            for other in found[1:]:
                torch.testing.assert_close(found[0], other, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("log", [False, True])
def test_hidden_is_hidden(backend, log):
    """Neither a hidden NaN nor the upstream gradient of what is hidden reaches anything."""
    door, none = (log_softmax, -torch.inf) if log else (softmax, 0.0)
    x = torch.randn(3, 20)
    visible = torch.rand(3, 20) > 0.5
    visible[1] = False
    g = torch.randn(3, 20)
    results = []
    for junk in (0.0, torch.nan, torch.inf):
        for mask in (visible, torch.zeros(3, 20).masked_fill(~visible, -torch.inf)):
            leaf = x.masked_fill(~visible, junk).requires_grad_()
            y = door(leaf, mask=mask, scale=0.5, backend=backend)
            (dx,) = torch.autograd.grad(y, leaf, g.masked_fill(~visible, junk))
            results.append((y, dx))
    for y, dx in results:
        assert (y[~visible] == none).all()
        assert (dx[~visible] == 0).all()
        torch.testing.assert_close(y[visible], results[0][0][visible], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(dx, results[0][1], rtol=1e-5, atol=1e-6)
    assert (results[0][0][1] == none).all()


@pytest.mark.parametrize("dim", [-1, 0])
def test_rows_of_minus_infinity_and_of_nan(backend, dim):
    x = torch.randn(6, 18)
    x[1] = -torch.inf
    x[2, 3] = torch.nan
    x[3, 4] = torch.inf
    x[4] = torch.finfo(torch.float32).min
    x = x if dim == -1 else x.t().contiguous()
    y = softmax(x, dim=dim, backend=backend)
    y = y if dim == -1 else y.t()
    assert (y[1] == 0).all()
    assert y[2:4].isnan().all()
    torch.testing.assert_close(y[4], torch.full((18,), 1 / 18))
    assert y[[0, 5]].isfinite().all()
    z = log_softmax(x, dim=dim, backend=backend)
    z = z if dim == -1 else z.t()
    assert (z[1] == -torch.inf).all()
    assert z[2:4].isnan().all()


@pytest.mark.parametrize("N", [*range(1, 70), 127, 128, 129, 255, 4095, 4096, 4097, 2**17 + 5])
def test_every_width(N):
    skip_unusable("softmax_fwd", "cpu")
    rows = 3 if N < 10000 else 1
    x, g = torch.randn(rows, N), torch.randn(rows, N)
    for log in (False, True):
        door, torch_door = (log_softmax, torch.log_softmax) if log else (softmax, torch.softmax)
        for dim in (0, 1):
            leaf = (x if dim else x.t().contiguous()).clone().requires_grad_()
            up = g if dim else g.t()
            with guarded_outputs():
                out = door(leaf, dim=dim, backend="cpu")
                (dx,) = torch.autograd.grad(out, leaf, up)
            wide = leaf.detach().double().requires_grad_()
            gold = torch_door(wide, dim)
            (want,) = torch.autograd.grad(gold, wide, up.double())
            torch.testing.assert_close(out.double(), gold, atol=2e-6, rtol=2e-6)
            torch.testing.assert_close(dx.double(), want, atol=2e-5, rtol=2e-5)


def test_rows_sum_to_one():
    for dtype in DTYPES:
        total = softmax(torch.randn(50, 1000).to(dtype)).double().sum(-1)
        assert (total - 1).abs().max() < 4 * torch.finfo(dtype).eps


def test_outputs_lie_as_inputs():
    x = torch.randn(2, 3, 4, 5)
    for t in (x, x.transpose(1, 2), x.permute(3, 1, 0, 2)):
        for dim in range(4):
            y = softmax(t, dim=dim)
            assert y.stride() == t.stride()
            torch.testing.assert_close(y, torch.softmax(t, dim))


def test_into_memory_that_is_there(backend):
    x, m = torch.randn(2, 3, 24), additive(3, 24).float()
    for t, dim in ((x, -1), (x.transpose(0, 2), 0), (x.movedim(1, -1), 1)):
        mask = m if dim == -1 else None
        expected = softmax(t, scale=0.5, mask=mask, dim=dim, backend="reference")
        out = torch.full_like(t, torch.nan)
        version = out._version
        assert softmax(t, scale=0.5, mask=mask, dim=dim, out=out, backend=backend) is out
        assert out._version > version
        torch.testing.assert_close(out, expected)
        same = t.clone()
        torch.testing.assert_close(
            softmax(same, scale=0.5, mask=mask, dim=dim, out=same, backend=backend), expected
        )
    five = torch.randn(2, 3, 2, 2, 8).transpose(0, 1)
    out = torch.empty_like(five)
    torch.testing.assert_close(
        log_softmax(five, out=out, backend=backend), torch.log_softmax(five, -1)
    )
    torch.testing.assert_close(out, torch.log_softmax(five, -1))


def test_nothing_depends_on_threads_or_the_run():
    x, g = torch.randn(400, 3, 96).bfloat16(), torch.randn(400, 3, 96).bfloat16()
    masks = (torch.randn(96), torch.randn(400, 1, 96), torch.randn(3, 1))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found = []
            for m in masks:
                leaves = x.clone().requires_grad_(), m.clone().requires_grad_()
                out = softmax(leaves[0], mask=leaves[1])
                found += [out, *torch.autograd.grad(out, leaves, g)]
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_gives_what_torch_gives():
    x = torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert softmax(x).dtype is torch.softmax(x, -1).dtype
        assert softmax(x.float()).dtype is torch.softmax(x.float(), -1).dtype
    # As under CUDA's autocast.
    for backend in BACKENDS:
        out = softmax_fwd(x, None, 1.0, False, False, False, True, backend=backend)
        assert out.dtype is torch.float32
        torch.testing.assert_close(out, torch.softmax(x.float(), -1))


@pytest.mark.parametrize(
    "name", ["scale and float mask", "log, bool mask", "middle dimension", "transposed", "no rows"]
)
def test_opcheck_and_fake(name):
    case = BY_NAME[name]
    with recorded_calls() as calls:
        leaves = {
            n: t.float().requires_grad_() if t.is_floating_point() else t
            for n, t in case.inputs().items()
        }
        case.function(None)(**leaves).nan_to_num().sum().backward()
    assert [op.name for op, _, _ in calls] == ["softmax_fwd", "softmax_bwd"]
    for op, args, _ in calls:
        opcheck(op, args)


def test_opcheck_of_out():
    from fasttx.ops.softmax import softmax_out

    x = torch.randn(3, 8)
    args = (torch.empty(3, 8), x, additive(3, 8).float(), 0.5, False, False, False, False)
    torch.library.opcheck(softmax_out.overload, args, {"backend": None})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def full(x, mask):
        y = softmax(x, scale=0.3, mask=mask, is_causal=True)
        return y + log_softmax(x, dim=1).exp() + softmax(x.transpose(0, 2), dim=0).transpose(0, 2)

    def arguments(rows):
        return [torch.randn(s, requires_grad=True) for s in ((rows, 6, 8), (6, 8))]

    check_compiled(full, arguments, dynamic)


def test_transforms():
    x = torch.randn(4, 3, 6)
    got = torch.func.vmap(lambda t: softmax(t, dim=0))(x)
    torch.testing.assert_close(got, torch.softmax(x, 1))
    jacobian = torch.func.jacrev(lambda t: softmax(t, scale=2.0))(x[0, 0])
    torch.testing.assert_close(
        jacobian, torch.func.jacrev(lambda t: torch.softmax(2 * t, -1))(x[0, 0])
    )


def test_more_than_32_bit_offsets():
    """Rows and columns 2^31 elements apart: strides, not memory."""
    skip_unusable("softmax_fwd", "cpu")
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.float16)  # touched only where rows lie
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    x = memory.as_strided((2, 40), (2**31, 1))
    x.copy_(torch.randn(2, 40))
    for dim in (0, 1):
        expected = softmax(x.clone(), dim=dim, backend="cpu")
        torch.testing.assert_close(softmax(x, dim=dim, backend="cpu"), expected)


X = torch.randn(2, 6, 8)
NUMBER = "scale must be a finite number, got"
BAD = {
    "x type": (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    "x dtype": (TypeError, "x must be float32, .* got int64", {"x": X.long()}),
    "x scalar": (ValueError, "x must have at least 1 dimension, got a scalar", {"x": X[0, 0, 0]}),
    "dim": (ValueError, r"dim must be in \[-3, 3\), got 3", {"dim": 3}),
    "dim low": (ValueError, r"dim must be in \[-3, 3\), got -4", {"dim": -4}),
    "dim type": (TypeError, "dim must be an int, got None", {"dim": None}),
    "scale nan": (ValueError, f"{NUMBER} nan", {"scale": float("nan")}),
    "scale inf": (ValueError, f"{NUMBER} inf", {"scale": float("inf")}),
    "scale type": (TypeError, f"{NUMBER} None", {"scale": None}),
    "mask type": (TypeError, "mask must be a tensor or None, got float", {"mask": 1.0}),
    "mask dtype": (TypeError, "mask must be bool .* got int64", {"mask": torch.ones(8).long()}),
    "mask double": (TypeError, "mask must be float64 only where x is, got x of float32", {"mask": torch.ones(8).double()}),
    "mask shape": (ValueError, r"mask must broadcast to x's shape \(2, 6, 8\), got \(7,\)", {"mask": torch.ones(7)}),
    "mask rank": (ValueError, r"mask must broadcast to x's shape \(2, 6, 8\), got \(1, 2, 6, 8\)", {"mask": torch.ones(1, 2, 6, 8)}),
    "mask device": (ValueError, "mask must be on x's device cpu, got meta", {"mask": torch.ones(8, device="meta")}),
    "causal": (ValueError, "is_causal must be False, True, 'upper_left' or 'lower_right', got 'left'", {"is_causal": "left"}),
    "causal type": (ValueError, "is_causal must be False, True, .* got 1", {"is_causal": 1}),
    "causal rows": (ValueError, "is_causal needs rows: x must have at least 2 dimensions, got 1", {"x": X[0, 0], "is_causal": True}),
    "out type": (TypeError, "out must be a tensor or None, got int", {"out": 1}),
    "out shape": (ValueError, r"out must have x's shape \(2, 6, 8\), got \(6, 8\)", {"out": X[0].clone()}),
    "out dtype": (TypeError, "out must be float32, got bfloat16", {"out": X.bfloat16()}),
    "out device": (ValueError, "out must be on x's device cpu, got meta", {"out": X.to("meta")}),
    "out expanded": (ValueError, "out must have memory of its own .* strides", {"out": torch.empty(1, 6, 8).expand(2, 6, 8)}),
    "out and gradient": (ValueError, "x must not require grad where out is given", {"x": X.clone().requires_grad_(), "out": torch.empty_like(X)}),
    "backend": (ValueError, "backend must be None or one of cpu, .*torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip


@pytest.mark.parametrize("door", [softmax, log_softmax])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, door, monkeypatch):
    refused(monkeypatch, door, BAD[name], x=X)


def test_unsupported_lists_every_reason():
    with pytest.raises(NotImplementedError, match=r"cpu: needs float32.*got float64"):
        softmax(X.double(), backend="cpu")


def test_exported():
    assert fasttx.softmax is softmax
    assert fasttx.log_softmax is log_softmax
