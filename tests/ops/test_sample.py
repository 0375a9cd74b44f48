"""sample: one definition on every backend, bit for bit, and the distribution it draws from."""
# ruff: noqa: E501 (tables, one case a line)

import itertools
import math

import pytest
import torch
from torch import Tensor

import fasttx
from fasttx.ops.sample import sample, sample_fwd
from fasttx.testing import guarded_outputs, lay_out, recorded_calls
from tests.ops.contract import (
    BACKENDS,
    DTYPES,
    backend_fixture,
    check_compiled,
    opcheck,
    refused,
    skip_unusable,
)

INF, NAN = math.inf, math.nan
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.sample runs on the plain"),
    # NumPy's word for inf - inf under the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


backend = backend_fixture("sample_fwd")


def kept(x: Tensor, temperature=1.0, top_k=None, top_p=None) -> Tensor:
    """Exact fp64 probabilities [V] of one row, by the words of the docstring."""
    p = (x.double() / temperature).softmax(-1)
    if top_k is not None:
        p = p * (x >= x.sort(descending=True).values[min(top_k, len(x)) - 1])
        p = p / p.sum()
    if top_p is not None:
        above = torch.stack([p[x > v].sum() for v in x])
        p = p * ((above < top_p) | (x == x.max()))
    return p / p.sum()


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0, "top_k": 5},
    {"top_p": 0.8},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    {"top_k": 1},
    {"top_p": 0.0},
]


def selected(backends=("cpu", "triton")):
    for backend in backends:
        for i, options in enumerate(FILTERS):
            slow = backend == "triton" and i != 4
            name = "-".join(f"{k}={v}" for k, v in options.items()) or "plain"
            marks = pytest.mark.slow if slow else ()
            yield pytest.param(backend, options, id=f"{backend}-{name}", marks=marks)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distribution(options, dtype):
    """Chi-square of seeded draws against exact probabilities; with the seed fixed it cannot flake.
    Nothing filtered out is ever drawn."""
    skip_unusable("sample_fwd", "cpu")
    V, draws = 30, 40_000
    x = (2 * torch.randn(V)).to(dtype)
    x[3], x[17] = x[5], x[5]
    ids = sample(x.expand(draws, V), **options, seed=12, backend="cpu")
    counts, p = ids.bincount(minlength=V).double(), kept(x.float(), **options)
    assert not counts[p == 0].any()
    expected = draws * p[p > 0]
    chi = ((counts[p > 0] - expected).square() / expected).sum().item()
    freedom = int((p > 0).sum()) - 1
    # Mean plus five standard deviations of chi-square; rare ids, whose terms vary more, are few.
    assert chi <= freedom + 5 * math.sqrt(2 * freedom + (1 / expected).sum().item()) + 1e-9


@pytest.mark.parametrize(("backend", "options"), list(selected()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_draws_the_same(backend, options, dtype):
    """The reference's ids, bit for bit: ties, infinities, widths off the vector's."""
    skip_unusable("sample_fwd", backend)
    fast = backend == "cpu"
    for V in (1, 2, 7, 16, 33, 1000, 5003) if fast else (37,):
        x = 3 * torch.randn(40 if fast else 4, V)
        x[0], x[1] = 0, x[1].round()
        if V > 4:
            x[2, 2], x[2, 4], x[3, :3] = INF, INF, -INF
        x = x.to(dtype)
        with guarded_outputs():
            got = sample(x, **options, seed=7, backend=backend)
        assert torch.equal(got, sample(x, **options, seed=7, backend="reference")), V


def test_weights_are_a_softmax():
    """The integer weights against fp64: relative error 1e-7 down to where the cut begins."""
    from fasttx.reference.sample import _mass

    x = -torch.linspace(0, 15, 10_001)
    w = _mass(x[None], x.amax(-1, keepdim=True)[None], 2**24 / math.log(2))[0].double()
    error = (w / w[0] / x.double().exp() - 1).abs()
    # An fp32 product of 15 rounds by 15 * 2^-24; weights are cut to integers.
    assert error.max() < 2e-7 + 15 * 2**-23 + 2**-16
    assert error[: 10_001 // 5].max() < 6e-7
    assert (w.diff() <= 0).all()


def test_top_k_of_every_order():
    """Ascending, descending and equal logits: the k-th largest exactly, ties kept whole."""
    skip_unusable("sample_fwd", "cpu")
    V = 2500
    rows = torch.stack(
        [torch.arange(V), torch.arange(V).flip(0), torch.zeros(V), torch.arange(V) // 100]
    ).float()
    for k in (1, 600, V - 1):
        for row, x in enumerate(rows):
            draws = x.expand(20, V)
            got = sample(draws, top_k=k, temperature=1e4, seed=row, backend="cpu")
            assert (x[got] >= x.sort(descending=True).values[k - 1]).all()
            assert torch.equal(
                got, sample(draws, top_k=k, temperature=1e4, seed=row, backend="reference")
            )


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_is_argmax(backend, dtype):
    skip_unusable("sample_fwd", backend)
    x = torch.randn(5, 700).to(dtype)
    x[1], x[2, 9], x[2, 300], x[3, 5:] = 2.0, INF, INF, -INF
    with guarded_outputs():
        got = sample(x, temperature=0, top_k=3, top_p=0.1, backend=backend)
    assert got[1:3].tolist() == [0, 9]  # the first of equals
    assert torch.equal(got, x.argmax(-1))
    strided = lay_out(x, "transposed")
    assert torch.equal(sample(strided, temperature=0, backend=backend), got)
    assert sample(x[0], temperature=0.0, backend=backend).shape == ()


def test_infinities(backend):
    """-inf is never drawn, +inf alone is."""
    x = torch.zeros(6, 9)
    x[:3, 2:], x[3:, 4], x[3:, 6] = -INF, INF, INF
    ids = sample(x, seed=3, backend=backend)
    assert (ids[:3] < 2).all()
    assert all(int(i) in (4, 6) for i in ids[3:])


def test_draws_are_not_torch_s():
    with pytest.raises(NotImplementedError, match="torch: does not support seed"):
        sample(torch.randn(2, 5), seed=1, backend="torch")


ANSWERING = [*itertools.product(BACKENDS, (1.0, 0)), ("torch", 0)]


@pytest.mark.parametrize("row", [[NAN, 1.0, 2.0], [-INF, -INF, -INF], [INF, NAN, -INF]])
@pytest.mark.parametrize(("backend", "temperature"), ANSWERING)
def test_rows_without_an_answer(backend, row, temperature):
    skip_unusable("sample_fwd", backend)
    x = torch.randn(3, 3)
    x[1] = torch.tensor(row)
    with pytest.raises(
        ValueError,
        match="logits must have a number above -inf and no NaN in every row, got neither in row 1",
    ):
        sample(x, temperature=temperature, backend=backend)
    seed = None if temperature == 0 else torch.tensor([1])
    ids = sample_fwd(x, seed, 2e7, 0, 1.0, temperature == 0, backend=backend)
    assert ids[1] == -1
    assert (ids[[0, 2]] >= 0).all()


def test_seed_and_generator():
    x = torch.randn(100, 50)

    def drawn(**options):
        return sample(x, **options)

    assert torch.equal(drawn(seed=5), drawn(seed=torch.tensor([5])))
    assert not torch.equal(drawn(seed=5), drawn(seed=6))
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append([drawn(), drawn()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(*results[0])
    generator, state = torch.Generator().manual_seed(9), torch.get_rng_state()
    first = drawn(generator=generator)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    assert torch.equal(first, drawn(generator=generator.manual_seed(9)))
    before = generator.get_state()
    drawn(generator=generator, temperature=0)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded"])
def test_layouts(backend, layout):
    x = torch.randn(2, 3, 20)
    laid = lay_out(x, layout)
    copy = laid.clone()
    for flat in (laid, laid[:, -1], laid[0, 0]):
        got = sample(flat, top_k=5, seed=1, backend=backend)
        assert torch.equal(got, sample(flat.contiguous(), top_k=5, seed=1, backend="reference"))
        assert got.shape == flat.shape[:-1]
        assert got.dtype is torch.int64
    assert torch.equal(laid, copy)
    for shape in ((0, 4), (2, 0, 4)):
        assert sample(torch.randn(shape), backend=backend).shape == shape[:-1]


def test_logits_may_require_grad():
    x = torch.randn(2, 5, requires_grad=True)
    assert not sample(x).requires_grad
    assert sample(x.double(), temperature=0).tolist() == x.argmax(-1).tolist()


def test_nothing_depends_on_threads():
    x, results, before = torch.randn(64, 3000), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(sample(x, top_k=100, top_p=0.9, seed=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_more_than_32_bit_offsets():
    """A row 2^31 elements after the first one: a stride, not memory."""
    skip_unusable("sample_fwd", "cpu")
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.float16)  # touched only where rows lie
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    x = memory.as_strided((2, 40), (2**31, 1))
    x.copy_(torch.randn(2, 40))
    assert torch.equal(sample(x, seed=1, backend="cpu"), sample(x.clone(), seed=1, backend="cpu"))


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.5}, {"temperature": 0}])
def test_opcheck_and_fake(options):
    with recorded_calls() as calls:
        sample(torch.randn(3, 20), **options)
    ((op, args, _),) = calls
    opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def full(x):
        return sample(x, temperature=0.7, top_k=5, top_p=0.9, seed=3)

    check_compiled(full, lambda rows: [torch.randn(rows, 50)], dynamic)


X = torch.randn(2, 8)
BAD = {
    "type": (TypeError, "logits must be a tensor, got list", {"logits": [1.0]}),
    "dtype": (TypeError, "logits must be float32, .* got int64", {"logits": X.long()}),
    "scalar": (ValueError, r"logits must be \[..., V\] with 1 <= V <= 16777216, got shape \(\)", {"logits": X[0, 0]}),
    "no classes": (ValueError, r"logits must be .* got shape \(2, 0\)", {"logits": X[:, :0]}),
    "too many": (ValueError, r"logits must be .* got shape \(1, 16777217\)", {"logits": X[:1, :1].expand(1, 2**24 + 1)}),
    "temperature negative": (ValueError, "temperature must be a finite number of at least 0, got -1", {"temperature": -1}),
    "temperature nan": (ValueError, "temperature must be a finite number of at least 0, got nan", {"temperature": NAN}),
    "temperature type": (TypeError, "temperature must be a finite number of at least 0, got None", {"temperature": None}),
    "top_k 0": (ValueError, "top_k must be None or an int of at least 1, got 0", {"top_k": 0}),
    "top_k float": (ValueError, "top_k must be None or an int of at least 1, got 2.0", {"top_k": 2.0}),
    "top_k type": (TypeError, "top_k must be None or an int of at least 1, got 'x'", {"top_k": "x"}),
    "top_p high": (ValueError, r"top_p must be None or in \[0, 1\], got 1.1", {"top_p": 1.1}),
    "top_p negative": (ValueError, r"top_p must be None or in \[0, 1\], got -0.1", {"top_p": -0.1}),
    "top_p type": (TypeError, r"top_p must be None or in \[0, 1\], got 'x'", {"top_p": "x"}),
    "generator type": (TypeError, "generator must be None or a torch.Generator, got int", {"generator": 3}),
    "generator and seed": (ValueError, "generator must be None where seed is given, got both", {"generator": torch.Generator(), "seed": 1}),
    "seed": (ValueError, "seed must be a 64-bit int.*got 'x'", {"seed": "x"}),
    "backend": (ValueError, "backend must be None or one of cpu, cuda, triton, reference, torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(monkeypatch, fasttx.sample, BAD[name], logits=X)


def test_unsupported_lists_every_reason():
    with pytest.raises(NotImplementedError, match=r"cpu: needs float32.*got float64"):
        sample(X.double(), backend="cpu")
