"""The Triton kernels of attention, under the interpreter, against the formula in fp64.

The error allowed is twice that of the formula computed by PyTorch in the inputs' own dtype (three
times for gradients), plus one rounding of the largest element.
"""

import pytest
import torch
from fasttx.kernels.attention import attention_bwd, attention_fwd, forward_calls
from fasttx.kernels.attention_bwd import backward_calls

from . import formula

INF, NAN = float("inf"), float("nan")
SCALARS = {
    "scale": None,
    "softcap": 0.0,
    "dropout_p": 0.0,
    "left": -1,
    "right": -1,
    "lower_right": False,
    "bias_shift": 0,
}
TENSORS = ("mask", "slopes", "positions", "table", "lut", "cu_q", "cu_k", "seed")


def inputs(B=1, H=2, G=1, S=70, T=100, D=24, DV=None, dtype=torch.float32):
    DV = D if DV is None else DV
    shapes = (B, H, S, D), (B, G, T, D), (B, G, T, DV)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def inner(q, **options):
    """The op's inner arguments after q, k, v."""
    given = dict.fromkeys(TENSORS) | SCALARS | {"scale": q.size(3) ** -0.5} | options
    return {name: given[name] for name in (*TENSORS, *SCALARS)}


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, NAN, dtype=dtype)


def forward(q, k, v, **options):
    B, H, S, _ = q.shape
    out = poisoned(B, S, H, v.size(3), dtype=q.dtype).transpose(1, 2)
    lse = poisoned(B, H, S)
    attention_fwd(out, lse, q, k, v, *inner(q, **options).values())
    return out, lse


def backward(q, k, v, out, lse, dout, dlse=None, need=None, **options):
    arguments = inner(q, **options)
    mask, table = arguments["mask"], arguments["table"]
    if need is None:
        trained = mask is not None and mask.dtype != torch.bool
        need = 7 + 8 * trained + 16 * (table is not None)
    targets = (q, k, v, mask, table)
    grads = [
        poisoned(*x.shape, dtype=x.dtype) if need & 1 << n else q.new_empty(0)
        for n, x in enumerate(targets)
    ]
    attention_bwd(*grads, dout, dlse, q, k, v, out, lse, *arguments.values(), need)
    return [g for n, g in enumerate(grads) if need & 1 << n]


def expected(q, k, v, dout, dlse, dtype, **options):
    """out, lse and the gradients by the formula in dtype."""
    leaves = {"q": q, "k": k, "v": v} | {
        name: x
        for name in ("mask", "table")
        if (x := options.get(name)) is not None and x.dtype != torch.bool
    }
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    arguments = inner(q, **options) | leaves
    out, lse = formula.attention(**arguments, dtype=dtype)
    loss = (out.double() * dout.double()).sum()
    if dlse is not None:
        loss = loss + (lse.double() * dlse.double())[torch.isfinite(lse)].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return [x.detach() for x in (out, lse, *grads)]


def assert_close(name, got, want, plain, factor, dtype, floor=0.0):
    assert got.shape == want.shape
    got, finite = got.double(), torch.isfinite(want)
    assert torch.equal(got[~finite], want[~finite]), name
    if not finite.any():
        return
    error, other = ((x.double() - want)[finite].abs().max().item() for x in (got, plain))
    allowed = factor * other + torch.finfo(dtype).eps * want[finite].abs().max().item() + floor
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def check(q, k, v, dlse=None, dout=None, floor=0.0, **options):
    """Forward and every gradient of one call against the formula."""
    out, lse = forward(q, k, v, **options)
    if dout is None:
        dout = torch.randn(out.size(0), out.size(2), out.size(1), out.size(3))
        dout = dout.to(q.dtype).transpose(1, 2)
    grads = backward(q, k, v, out, lse, dout, dlse, **options)
    want = expected(q, k, v, dout, dlse, torch.float64, **options)
    plain = expected(q, k, v, dout, dlse, q.dtype, **options)
    assert_close("out", out, want[0], plain[0], 2, q.dtype)
    assert_close("lse", lse, want[1], plain[1], 2, torch.float32)
    names = ["dq", "dk", "dv"] + [n for n in ("mask", "table") if options.get(n) is not None]
    for name, got, exact, other in zip(names, grads, want[2:], plain[2:], strict=False):
        assert_close(name, got, exact, other, 3, got.dtype, floor)


def lookup(reach=20, buckets=32):
    return torch.randint(0, buckets, (2 * reach + 1,), dtype=torch.int32)


def float_mask(*shape, hidden=0.2):
    return torch.randn(shape).masked_fill(torch.rand(shape) < hidden, -INF)


def dropout(p=0.3):
    return {"dropout_p": p, "seed": torch.tensor([-12345678901234])}


def bias_table(buckets=32):
    return {"table": torch.randn(buckets, 2), "lut": lookup(buckets=buckets)}


OPTIONS = {
    "plain": dict,
    "causal": lambda: {"right": 0},
    "causal lower right": lambda: {"right": 0, "lower_right": True},
    "window": lambda: {"left": 20, "right": 9},
    "window lower right": lambda: {"left": 5, "right": 0, "lower_right": True},
    "left only": lambda: {"left": 3},
    "softcap": lambda: {"softcap": 0.5, "right": 30},
    "negative scale": lambda: {"scale": -0.3},
    "zero scale": lambda: {"scale": 0.0},
    "bool keys": lambda: {"mask": torch.rand(1, 1, 1, 100) < 0.4},
    "bool rows": lambda: {"mask": torch.rand(1, 1, 70, 1) < 0.5},
    "bool pairs": lambda: {"mask": torch.rand(1, 1, 70, 100) < 0.3, "right": 0},
    "bool batch": lambda: {"mask": torch.tensor([True, False])[:, None, None, None]},
    "bool heads": lambda: {"mask": torch.rand(1, 2, 1, 100) < 0.3},
    "float all": lambda: {"mask": float_mask(2, 2, 70, 100)},
    "float heads": lambda: {"mask": float_mask(1, 2, 70, 100), "left": 30},
    "float batch": lambda: {"mask": float_mask(2, 1, 70, 100), "softcap": 2.0},
    "float pairs": lambda: {"mask": float_mask(1, 1, 70, 100).half()},
    "float keys": lambda: {"mask": float_mask(2, 1, 1, 100)},
    "float rows": lambda: {"mask": float_mask(1, 2, 70, 1)},
    "float one": lambda: {"mask": torch.randn(1, 2, 1, 1)},
    "float strided": lambda: {"mask": float_mask(1, 2, 100, 70).transpose(2, 3)},
    "alibi": lambda: {"slopes": torch.rand(1, 2) / 8},
    "alibi positions": lambda: {"slopes": torch.rand(2, 2), "positions": torch.randn(2, 100)},
    "table": lambda: bias_table() | {"bias_shift": 3},
    "table causal": lambda: bias_table() | {"right": 0, "lower_right": True},
    "table wide": lambda: {
        "table": torch.randn(101, 2),
        "lut": torch.arange(201, dtype=torch.int32) // 2,
        "mask": float_mask(1, 2, 70, 1),
        "softcap": 2.0,
    },
    "dropout": dropout,
    "dropout everywhere": lambda: (
        dropout(0.9)
        | {"mask": float_mask(1, 1, 70, 100), "right": 40, "slopes": torch.rand(1, 2) / 8}
    ),
}
BATCHES = {"bool batch": 2, "float all": 2, "float batch": 2, "float keys": 2, "alibi positions": 2}


@pytest.mark.parametrize("name", OPTIONS)
def test_feature(name):
    B = BATCHES.get(name, 1)
    check(*inputs(B), dlse=torch.randn(B, 2, 70), **OPTIONS[name]())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "float pairs", "table", "dropout everywhere"])
def test_half_precision(name, dtype):
    options = OPTIONS[name]()
    if "table" in options:
        options["table"] = options["table"].to(dtype)
    check(*inputs(dtype=dtype), **options)


@pytest.mark.parametrize(
    "size",
    [
        {"S": 1, "T": 2},
        {"S": 1, "T": 130, "D": 1, "DV": 3},
        {"S": 130, "T": 2},
        {"S": 64, "T": 128, "D": 64},
        {"S": 65, "T": 63, "D": 33, "DV": 80},
        {"S": 16, "T": 40, "D": 256, "DV": 129},
        {"S": 20, "T": 30, "H": 6, "G": 2},
        {"S": 20, "T": 30, "H": 3, "G": 3, "B": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("right", [-1, 0])
def test_sizes(size, right):
    """Rows with one key have ds = dp - delta = 0 exactly; here dp and delta are the same sum in two
    orders, equal to rounding (8e-7 measured), where PyTorch's softmax subtracts equal numbers."""
    check(*inputs(**size), right=right, lower_right=size["S"] % 2 == 0, floor=2e-6)


def test_one_key():
    """dq and dk are 0 in exact arithmetic: dp and delta, the same sum in two orders, cancel."""
    q, k, v = inputs(S=70, T=1)
    dout = torch.randn(1, 2, 70, 24)
    out, lse = forward(q, k, v)
    dq, dk, dv = backward(q, k, v, out, lse, dout)
    assert torch.equal(out, v.expand(1, 2, 70, 24))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-4
    torch.testing.assert_close(dv, dout.sum((1, 2), keepdim=True), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [{"B": 0}, {"S": 0}, {"T": 0}, {"S": 0, "T": 0}], ids=str)
def test_empty(size):
    q, k, v = inputs(**size)
    mask = torch.randn(1, 1, q.size(2), k.size(2))
    table = torch.randn(32, 2)
    for options in ({}, {"right": 0}, {"mask": mask, "table": table, "lut": lookup()}):
        out, lse = forward(q, k, v, **options)
        assert (out == 0).all() and (lse == -INF).all()
        for gradient in backward(q, k, v, out, lse, torch.randn(out.shape), **options):
            assert (gradient == 0).all()


def test_strides():
    q, k, v = inputs()
    q = torch.randn(1, 70, 24, 2).permute(0, 3, 1, 2)
    k = torch.randn(1, 2, 24, 100).transpose(2, 3)
    v = torch.randn(1, 1, 100, 48)[..., ::2].expand(1, 2, 100, 24)
    dout = torch.randn(1, 1, 1, 24).expand(1, 2, 70, 24)
    mask = torch.randn(1, 1, 70, 200)[..., ::2].expand(1, 2, 70, 100)
    check(q, k, v, dout=dout, right=10)
    check(q, k, v, mask=mask, dlse=torch.randn(1, 2, 1).expand(1, 2, 70))


def test_large_strides_take_64_bits():
    """The same numbers as through small strides: one key leaves nothing else to compare with."""
    small = inputs(S=1, T=1)
    large = [x.as_strided(x.shape, (*x.stride()[:2], 2**40, 1)) for x in small]
    dout, dlse = torch.randn(1, 2, 1, 24), torch.randn(1, 2, 1)
    for got, want in zip(_pass(large, dout, dlse), _pass(small, dout, dlse), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    q, k, v = large
    calls = list(forward_calls("sm90", q, torch.empty(1, 2, 1), q, k, v, *inner(q).values()))
    assert calls[-1].features.WIDE


def _pass(tensors, dout, dlse):
    out, lse = forward(*tensors)
    return [out, lse, *backward(*tensors, out, lse, dout, dlse)]


def test_many_heads_stay_on_the_first_grid_axis():
    q = torch.empty(40_000, 4, 256, 64, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(40_000, 4, 256, device="meta")
    arguments = inner(q, right=0).values()
    calls = list(forward_calls("sm90", q, lse, q, q, q, *arguments))
    nothing = q.new_empty(0)
    calls += backward_calls(
        "sm90", q, q, q, nothing, nothing, q, None, q, q, q, q, lse, *arguments, 7
    )
    assert len(calls) == 3
    for call in calls:
        assert len(call.grid) == 1 and 160_000 <= call.grid[0] < 2**31


@pytest.mark.parametrize("lengths", [([30, 0, 35], [20, 60, 0]), ([1, 64, 5], [1, 64, 5])])
@pytest.mark.parametrize(
    "name", ["plain", "causal lower right", "window", "alibi", "table", "dropout"]
)
def test_packed(lengths, name):
    """Sequences laid end to end; rows past the last one give 0, keys past it get gradient 0."""
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in lengths)
    options = OPTIONS[name]()
    if "slopes" in options:
        options["slopes"] = torch.rand(max(1, len(lengths[0])), 2) / 8
    check(*inputs(S=72, T=90), cu_q=cu_q, cu_k=cu_k, **options)


def test_packed_equals_separate():
    q, k, v = inputs(S=100, T=100)
    cu = torch.tensor([0, 36, 100], dtype=torch.int32)
    out, lse = forward(q, k, v, cu_q=cu, cu_k=cu, right=0)
    for a, b in ((0, 36), (36, 100)):
        alone = forward(*(x[:, :, a:b] for x in (q, k, v)), right=0)
        assert torch.equal(out[:, :, a:b], alone[0]) and torch.equal(lse[:, :, a:b], alone[1])


def test_rows_without_keys_are_zero():
    q, k, v = inputs(B=2)
    mask = torch.ones(2, 1, 70, 100, dtype=torch.bool)
    mask[0, :, 5:20] = False
    mask[1] = False
    dout = torch.full((2, 2, 70, 24), NAN)
    out, lse = forward(q, k, v, mask=mask)
    dq, dk, dv = backward(q, k, v, out, lse, dout, mask=mask)
    empty = ~mask.any(3).expand(2, 2, 70)
    assert (out[empty] == 0).all() and (lse[empty] == -INF).all() and (dq[empty] == 0).all()
    assert (dk[1] == 0).all() and (dv[1] == 0).all()


@pytest.mark.parametrize(
    ("kind", "bad"), [("keys", INF), ("pairs", NAN), ("float", NAN), ("band", NAN), ("band", -INF)]
)
def test_hidden_values_reach_nothing(kind, bad):
    """NaN or Inf behind a mask or a band leaves every output and gradient finite and right."""
    q, k, v = inputs()
    # The band is causal, top left: 70 rows see no key past the 70th.
    visible = torch.arange(100)[None, None, None, :] < (70 if kind == "band" else 60)
    options = {
        "keys": {"mask": visible},
        "pairs": {"mask": visible.expand(1, 1, 70, 100)},
        "float": {"mask": torch.zeros(1, 1, 70, 100).masked_fill(~visible, -INF)},
        "band": {"right": 0},
    }[kind]
    dout = torch.randn(1, 2, 70, 24)
    clean = forward(q, k, v, **options)
    clean += tuple(backward(q, k, v, *clean, dout, need=7, **options))
    hidden = ~visible[0, 0, 0]
    k[:, :, hidden], v[:, :, hidden] = bad, bad
    dirty = forward(q, k, v, **options)
    dirty += tuple(backward(q, k, v, *dirty, dout, need=7, **options))
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_hidden_rows_reach_no_key():
    """Causal, top left: rows before j are hidden from key j, whatever they hold."""
    q, k, v = inputs(S=100, T=100)
    dout = torch.randn(1, 2, 100, 24)
    clean = forward(q, k, v, right=0)
    clean += tuple(backward(q, k, v, *clean, dout, right=0))
    q[:, :, 30], dout[:, :, 40] = NAN, INF
    out, lse = forward(q, k, v, right=0)
    dq, dk, dv = backward(q, k, v, out, lse, dout, right=0)
    kept = torch.ones(100, dtype=torch.bool)
    kept[[30, 40]] = False
    close = {"rtol": 1e-5, "atol": 1e-5}
    finite = kept | (torch.arange(100) == 40)
    torch.testing.assert_close(out[:, :, finite], clean[0][:, :, finite], **close)
    torch.testing.assert_close(dq[:, :, kept], clean[2][:, :, kept], **close)
    torch.testing.assert_close(dk[:, :, 41:], clean[3][:, :, 41:], **close)
    torch.testing.assert_close(dv[:, :, 41:], clean[4][:, :, 41:], **close)
    assert dk[:, :, :31].isnan().all() and dv[:, :, :31].isnan().all()
    assert not dv[:, :, 31:41].isfinite().any()


def test_visible_nonfinite_values_reach_their_rows():
    q, k, v = inputs(S=100, T=100)
    v[:, :, 50, 3], v[:, :, 51, 4], v[:, :, 52, 5] = NAN, INF, -INF
    out, _ = forward(q, k, v, right=0)
    for row, column, value in ((50, 3, NAN), (51, 4, INF), (52, 5, -INF)):
        seen = torch.full_like(out[:, :, row:, column], value)
        torch.testing.assert_close(out[:, :, row:, column], seen, equal_nan=True, rtol=0, atol=0)
        assert out[:, :, :row, column].isfinite().all()
    assert out[..., 6:].isfinite().all()
    k[:, :, 20] = NAN
    out, lse = forward(q, k, v, right=0)
    assert out[:, :, 20:].isnan().all() and lse[:, :, 20:].isnan().all()
    assert out[:, :, :20].isfinite().all()


@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, -1e9, -1e4])
def test_finite_minima_are_numbers(number):
    """Rows whose every key carries the same huge negative number attend as without it.

    Their lse rounds to the number itself, so the backward must not rest on it.
    """
    q, k, v = inputs(B=2)
    mask = torch.zeros(2, 1, 70, 100)
    mask[0, :, 10:40] = number
    mask[1, :, :, 50:] = number
    check(q, k, v, mask=mask)


@pytest.mark.parametrize("need", [1, 2, 4, 8, 16, 6, 25])
def test_need(need):
    """Only what is asked for is computed, and it is the same as when all is."""
    q, k, v = inputs(S=40, T=40)
    options = {"mask": torch.randn(1, 1, 1, 40), "table": torch.randn(32, 2), "lut": lookup()}
    out, lse = forward(q, k, v, **options)
    dout = torch.randn(out.shape)
    everything = backward(q, k, v, out, lse, dout, need=31, **options)
    some = backward(q, k, v, out, lse, dout, need=need, **options)
    chosen = [g for n, g in enumerate(everything) if need & 1 << n]
    for a, b in zip(some, chosen, strict=True):
        assert torch.equal(a, b)


def test_runs_are_bit_identical():
    q, k, v = inputs()
    options = OPTIONS["table wide"]() | dropout()
    runs = []
    for _ in range(2):
        out, lse = forward(q, k, v, **options)
        runs.append([out, lse, *backward(q, k, v, out, lse, torch.ones(out.shape), **options)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_dropout_bits():
    """With values of one-hot columns the output shows which probabilities survived."""
    q, k = torch.zeros(1, 2, 20, 16), torch.zeros(1, 2, 64, 16)
    v = torch.eye(64).expand(1, 2, 64, 64)
    seed = torch.tensor([-(2**62) + 12345])
    out, _ = forward(q, k, v, dropout_p=0.25, seed=seed)
    keep, gain = formula.dropout_keep(int(seed), 0, 2, 20, 64, 0.25)
    assert torch.equal(out[0] > 0, keep)
    torch.testing.assert_close(out[0], keep * (gain / 64))
