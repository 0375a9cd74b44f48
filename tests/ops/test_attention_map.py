"""attention_map on every backend and dtype against fp64, with every feature of attention."""
# ruff: noqa: E501 (tables, one case a line)

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fasttx
from fasttx.ops._attention_checks import checked
from fasttx.ops.attention_map import attention_map, attention_map_fwd
from fasttx.reference.attention import attention_math
from fasttx.reference.attention_map import attention_map_math
from fasttx.testing import check, guarded_outputs, recorded_calls
from tests.ops.attention_cases import cases, qkv
from tests.ops.contract import (
    BACKENDS,
    DTYPES,
    backend_fixture,
    check_compiled,
    opcheck,
    parameter,
    refused,
    skip_unusable,
)

# The lse of finite minima has no digits: see test_lse_is_taken_at_its_word.
CASES = [c for c in cases() if "cu_seqlens" not in c.options and c.name != "rows of finite minima"]
QUICK = {"padding", "float mask [1,H,S,T]", "relative", "window and softcap, grouped"}
DROPPED = ("dropout_p", "seed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.attention_map runs on the plain"),
    # NumPy's word for inf - inf under the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


backend = backend_fixture("attention_map_fwd")


def _inner(inputs: dict, options: dict) -> tuple:
    named = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "position_bias": None,
             "window": None, "softcap": None, "cu_seqlens": None, "seed": None, **inputs, **options, "backend": None}  # fmt: skip
    return checked(**named)


def _options(case, inputs: dict) -> dict:
    """The case's options and the position bias made of the named inputs that it takes away."""
    extra = {n: inputs.pop(n) for n in ("table", "slopes", "positions") if n in inputs}
    options = {n: v for n, v in case.options.items() if n not in DROPPED}
    if case.bias is not None:
        options["position_bias"] = case.bias(**extra)
    return options


def lse_of(case, dtype: torch.dtype) -> Tensor:
    """fp32, of the inputs as dtype rounds them, by fp64."""
    inputs = {}
    for n, t in case.inputs.items():
        if t.is_floating_point() and n not in case.keep:
            t = t.to(dtype).double()
        inputs[n] = t
    options = _options(case, inputs)
    call = _inner(inputs, options)
    lse, leading = _exact_lse(call), call[3]
    return (lse if leading is None else lse.reshape(leading + lse.shape[-1:])).float()


def _exact_lse(call: tuple) -> Tensor:
    (q, k, v, mask, table), (slopes, positions, *packed), scalars, _ = call
    inner = (q, k, v, mask, slopes, positions, table, *packed, *scalars)
    return attention_math(*inner, compute=torch.float64)[1]


def function(case, backend, choice: dict, compute: torch.dtype | None = None, early=False):
    """early: the scale is applied to the query, as PyTorch's own attention does."""

    def call(query, key, lse, **inputs):
        options = _options(case, inputs)
        if compute is None:
            return attention_map(query, key, lse, **inputs, **options, **choice, backend=backend)
        inputs = {"query": query, "key": key, "value": key, **inputs}
        inner = _inner(inputs, options)
        (q, k, _, mask, table), (slopes, positions, lut, *_), scalars, leading = inner
        scale, softcap, _, *band = scalars
        B, H, S, _ = q.shape
        if early:
            q, scale = q.to(compute) * scale, 1.0
        if compute is torch.float64:  # the full softmax
            lse = _exact_lse(inner)
        heads, rows = (
            None if n not in choice else torch.tensor(list(choice[n])) for n in ("heads", "rows")
        )
        p = attention_map_math(
            q, k, lse.reshape(B, H, S), heads, rows, mask, slopes, positions, table, lut, scale,
            softcap, *band, choice.get("pool") or 0, compute=compute,
        )  # fmt: skip
        if leading is None:
            return p
        return p.reshape((*leading[:-1], *p.shape[1:]) if leading else p.shape[2:])

    return call


def choices(case) -> dict[str, dict]:
    q = case.inputs["query"]
    S, H = q.shape[-2], q.shape[-3] if q.dim() > 2 else 0
    some = [*range(S - 1, -1, -3), *range(S // 2)]
    chosen = {"rows": some, "heads": [H - 1, 0]} if H else {"rows": some}
    return {
        "all": {},
        "chosen": chosen,
        "pooled": {"pool": 5},
        "pooled rows": {"rows": some, "pool": 4},
    }


def _selected():
    for backend in (*BACKENDS, "torch"):
        for case in CASES:
            for dtype in DTYPES:
                if dtype is torch.float16 and backend != "cpu":
                    continue
                for choice in choices(case):
                    slow = backend == "triton" and (
                        case.name not in QUICK or choice in ("chosen", "pooled")
                    )
                    slow |= backend == "triton" and dtype is torch.bfloat16 and choice == "all"
                    slow |= backend in ("reference", "torch") and choice != "pooled rows"
                    yield parameter(backend, dtype, case, choice, slow=slow)


@pytest.mark.parametrize(("name", "dtype", "case", "choice"), list(_selected()))
def test_against_fp64(name, dtype, case, choice):
    skip_unusable("attention_map_fwd", name)
    if not case.inputs["query"].shape[-2] and choice not in ("all", "pooled"):
        choice = "pooled"
    picked = choices(case)[choice]
    inputs = {n: t for n, t in case.inputs.items() if n != "value"} | {"lse": lse_of(case, dtype)}
    ours = function(case, name, picked)
    named = {"attn_mask", "table", "slopes", "softcap"} & {*inputs, *case.options}
    if name == "torch" and (named or case.bias is not None):
        x = {
            n: t if n in (*case.keep, "lse") or not t.is_floating_point() else t.to(dtype)
            for n, t in inputs.items()
        }
        with pytest.raises(NotImplementedError, match="torch: does not support"):
            ours(**x)
        return
    plain = (
        function(case, None, picked, dtype),
        function(case, None, picked, torch.float32),
        function(case, None, picked, torch.float32, early=True),
    )
    check(
        ours, function(case, None, picked, torch.float64), plain, inputs, dtype=dtype,
        keep=(*case.keep, "lse"),
        layouts={n: v for n, v in case.layouts.items() if n in inputs},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_softmax_that_attention_took(backend, dtype):
    """From attention's own lse: rows sum to 1, and p @ v is attention's output."""
    x = {n: t.to(dtype) for n, t in qkv(H=4, G=2, S=45, T=70).items()}
    mask = torch.rand(2, 1, 1, 70) > 0.3
    options = {"attn_mask": mask, "is_causal": "lower_right", "softcap": 8.0}
    out, lse = fasttx.attention(**x, **options, return_lse=True)
    p = attention_map(x["query"], x["key"], lse, **options, backend=backend)
    assert p.dtype is torch.float32
    # As exact as lse, and that is as exact as a sum of probabilities of dtype.
    rtol = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4, 45), rtol=rtol, atol=0)
    v = x["value"].double().repeat_interleave(2, 1)
    error = (p.double() @ v - out.double()).abs().max()
    assert error < 10 * torch.finfo(dtype).eps
    k = x["key"].double().repeat_interleave(2, 1)
    logits = 8 * torch.tanh(x["query"].double() @ k.transpose(2, 3) / 4 / 8)
    visible = mask & (torch.arange(70) <= torch.arange(45)[:, None] + 25)
    exact = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(p.double(), exact, rtol=rtol, atol=1e-7)
    cells = 3 if backend == "triton" else 9
    pooled = attention_map(x["query"], x["key"], lse, **options, pool=cells, backend=backend)
    mean = F.adaptive_avg_pool2d(exact, cells)
    torch.testing.assert_close(pooled.double(), mean, rtol=rtol, atol=1e-8)


def test_hidden_is_zero_whatever_it_holds(backend):
    x = {n: t.float() for n, t in qkv(S=20, T=30).items()}
    visible = torch.rand(2, 2, 20, 30) > 0.5
    visible[:, :, 3] = False
    visible[:, :, :, 7] = False
    for mask in (
        visible,
        torch.zeros(2, 2, 20, 30).masked_fill(~visible, -torch.inf),
        visible[:, :, :1],
    ):
        _, lse = fasttx.attention(**x, attn_mask=mask, return_lse=True, backend="reference")
        expected = attention_map(x["query"], x["key"], lse, attn_mask=mask, backend="reference")
        for junk in (torch.nan, torch.inf):
            key = x["key"].clone()
            key[:, :, 7] = junk
            p = attention_map(x["query"], key, lse, attn_mask=mask, backend=backend)
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)
            assert (
                p[~mask.expand(p.shape)] == 0 if mask.dtype is torch.bool else p[~visible] == 0
            ).all()
    assert (expected[:, :, :, 7] == 0).all()


def test_lse_is_taken_at_its_word(backend):
    """exp(logits - lse), whatever lse is: of finite minima it has no digits, each key then gives 1;
    one that is larger by ln 2, of twice as many keys, halves everything."""
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8)
    mask = torch.zeros(3, 5)
    mask[1] = torch.finfo(torch.float32).min
    _, lse = fasttx.attention(q, k, k, attn_mask=mask, return_lse=True)
    p = attention_map(q, k, lse, attn_mask=mask, backend=backend)
    assert (p[0, 0, 1] == 1).all()
    half = attention_map(q, k, lse + math.log(2), attn_mask=mask, backend=backend)
    torch.testing.assert_close(half[:, :, ::2], p[:, :, ::2] / 2)


def test_choices_are_parts_of_the_whole(backend):
    x = {n: t.float() for n, t in qkv(H=4, S=80, T=33).items()}
    _, lse = fasttx.attention(**x, is_causal=True, return_lse=True)
    q, k = x["query"], x["key"]
    whole = attention_map(q, k, lse, is_causal=True, backend=backend)

    def part(**choice):
        with guarded_outputs():
            return attention_map(q, k, lse, is_causal=True, **choice, backend=backend)

    for heads in (
        [1],
        [3, 0, 3],
        (2,),
        range(4),
        slice(1, None),
        torch.tensor([2, 1], dtype=torch.int32),
        [],
    ):
        at = heads if isinstance(heads, slice) else torch.as_tensor(list(heads), dtype=torch.long)
        torch.testing.assert_close(part(heads=heads), whole[:, at], atol=1e-7, rtol=1e-5)
    for rows in (
        [79],
        [5, 6, 7, 0, 79, 78, 5],
        range(2, 75),
        slice(None, None, 9),
        torch.arange(80).flip(0),
        [],
    ):
        at = rows if isinstance(rows, slice) else torch.as_tensor(list(rows), dtype=torch.long)
        torch.testing.assert_close(part(rows=rows), whole[:, :, at], atol=1e-7, rtol=1e-5)
    assert part(rows=[], pool=3).eq(0).all()
    for pool in (1, 3) if backend == "triton" else (1, 80, 100):  # a program a cell
        torch.testing.assert_close(
            part(pool=pool), F.adaptive_avg_pool2d(whole, pool), atol=1e-7, rtol=1e-5
        )


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_what_does_not_exist_is_nan(backend):
    """As in a tensor on a GPU, whose values no door reads."""
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 7, 8)
    lse = torch.zeros(1, 2, 9)
    heads, rows = torch.tensor([1, 2, -1]), torch.tensor([8, 9, -1, 2])
    tail = (None,) * 5 + (1.0, 0.0, -1, -1, False, 0)
    p = attention_map_fwd(q, k, lse, heads, rows, *tail, 0, backend=backend)
    assert p[:, 0, ::3].isfinite().all()
    assert p[:, 1:].isnan().all()
    assert p[:, 0, 1:3].isnan().all()
    assert attention_map_fwd(q, k, lse, None, rows, *tail, 1, backend=backend).isnan().all()
    assert attention_map_fwd(q, k, lse, heads, None, *tail, 2, backend=backend)[:, 1:].isnan().all()


def test_nothing_depends_on_threads_or_the_run():
    x = {n: t.bfloat16() for n, t in qkv(B=1, H=3, S=200, T=150, D=40).items()}
    _, lse = fasttx.attention(**x, return_lse=True)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append([attention_map(x["query"], x["key"], lse, pool=p) for p in (None, 6)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast():
    x = {n: t.float() for n, t in qkv(S=20).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, lse = fasttx.attention(**x, return_lse=True)
        p = attention_map(x["query"], x["key"], lse)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 2, 20), rtol=8e-3, atol=0)


def _call(backend=None):
    x = {n: t.float() for n, t in qkv(S=20, T=24).items()}
    table, mask = torch.randn(8, 2), torch.randn(1, 1, 20, 24)
    bias = fasttx.RelativePositionBias(table, max_distance=9)
    return lambda q, k, lse: attention_map(
        q,
        k,
        lse,
        heads=[1],
        rows=range(3, 17),
        pool=3,
        attn_mask=mask,
        position_bias=bias,
        window=(9, 9),
        backend=backend,
    ), (x["query"], x["key"], torch.randn(2, 2, 20))


def test_opcheck_and_fake():
    function, args = _call()
    with recorded_calls() as calls:
        function(*args)
    ((op, args, _),) = calls
    assert op.name == "attention_map_fwd"
    opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def function(q, k, lse):
        return (
            attention_map(q, k, lse, rows=[1, 0], is_causal=True)
            + attention_map(q, k, lse, pool=2).sum()
        )

    def arguments(S):
        return [torch.randn(2, 3, S, 8), torch.randn(2, 3, S, 8), torch.randn(2, 3, S)]

    check_compiled(function, arguments, dynamic)


def test_memory_stays_a_tile():
    """Two rows of 2^17 queries and keys: the whole map would be 64 GiB."""
    skip_unusable("attention_map_fwd", "cpu")
    n = 1 << 17
    q, k = torch.randn(1, 1, n, 4), torch.randn(1, 1, n, 4)
    logits = q[:, :, [0, n - 1]].double() @ k.double().transpose(2, 3) / 2
    lse = torch.zeros(1, 1, n)
    lse[:, :, [0, n - 1]] = logits.logsumexp(-1).float()
    p = attention_map(q, k, lse, rows=[0, n - 1], backend="cpu")
    torch.testing.assert_close(p.double(), logits.softmax(-1), rtol=1e-5, atol=1e-9)


X = {"q": torch.randn(2, 4, 6, 8), "k": torch.randn(2, 2, 5, 8), "lse": torch.zeros(2, 4, 6)}
BAD = {
    "q type": (TypeError, "q must be a tensor, got list", {"q": [1.0]}),
    "q dtype": (TypeError, "q must be float32, .* got int64", {"q": X["q"].long()}),
    "q rank": (ValueError, r"q must have at least 2 dimensions .* got shape \(8,\)", {"q": torch.randn(8)}),
    "k type": (TypeError, "k must be a tensor, got NoneType", {"k": None}),
    "k dtype": (TypeError, "k must have q's dtype float32, got bfloat16", {"k": X["k"].bfloat16()}),
    "k device": (ValueError, "k must be on q's device cpu, got meta", {"k": X["k"].to("meta")}),
    "k rank": (ValueError, r"k must have q's 4 dimensions, got shape \(2, 5, 8\)", {"k": X["k"][0]}),
    "k width": (ValueError, r"k must have q's head size 8, got shape \(2, 2, 5, 7\)", {"k": X["k"][..., :7]}),
    "k heads": (ValueError, "k must have a number of heads that divides q's 4, got 3", {"k": torch.randn(2, 3, 5, 8)}),
    "lse type": (TypeError, "lse must be a tensor, got float", {"lse": 0.0}),
    "lse dtype": (TypeError, "lse must be float32 beside float32, got float64", {"lse": X["lse"].double()}),
    "lse shape": (ValueError, r"lse must have shape \(2, 4, 6\), got \(2, 4, 5\)", {"lse": torch.zeros(2, 4, 5)}),
    "lse device": (ValueError, "lse must be on q's device cpu, got meta", {"lse": X["lse"].to("meta")}),
    "heads type": (TypeError, "heads must be a sequence of ints, a slice, .* got 1", {"heads": 1}),
    "heads dtype": (TypeError, r"heads must be an int32 or int64 tensor \[n\], got float32", {"heads": torch.zeros(1)}),
    "heads rank": (TypeError, r"heads must be an int32 or int64 tensor \[n\], got int64 of shape \(1, 1\)", {"heads": torch.zeros(1, 1).long()}),
    "heads range": (ValueError, r"heads must lie in \[0, 4\), got 4", {"heads": [0, 4]}),
    "heads bool": (TypeError, "heads must hold ints, got True", {"heads": [True]}),
    "rows range": (ValueError, r"rows must lie in \[0, 6\), got -1", {"rows": torch.tensor([2, -1])}),
    "rows type": (TypeError, "rows must hold ints, got 1.0", {"rows": [1.0]}),
    "rows device": (ValueError, "rows must be on q's device cpu, got meta", {"rows": torch.zeros(1, device="meta").long()}),
    "pool": (ValueError, "pool must be at least 1 or None, got 0", {"pool": 0}),
    "pool type": (TypeError, "pool must be an int or None, got 2.0", {"pool": 2.0}),
    "mask": (ValueError, r"attn_mask must broadcast to \(2, 4, 6, 5\), got shape \(6, 6\)", {"attn_mask": torch.zeros(6, 6)}),
    "causal": (ValueError, "is_causal must be False, True, .* got 'left'", {"is_causal": "left"}),
    "scale": (ValueError, "scale must be a finite number or None, got nan", {"scale": float("nan")}),
    "softcap": (ValueError, "softcap must be a finite number above 0 or None, got 0", {"softcap": 0}),
    "window": (ValueError, r"window must be a pair .* got 3", {"window": 3}),
    "bias": (TypeError, "position_bias must be fasttx.ALiBi, .* got int", {"position_bias": 1}),
    "gradient": (ValueError, "q must not require grad, .* attention_map has no gradient", {"q": X["q"].clone().requires_grad_()}),
    "mask gradient": (ValueError, "attn_mask must not require grad", {"attn_mask": torch.zeros(6, 5, requires_grad=True)}),
    "backend": (ValueError, "backend must be None or one of cpu, .*torch, got 'cudnn'", {"backend": "cudnn"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(monkeypatch, attention_map, BAD[name], **X)


def test_heads_need_a_dimension():
    with pytest.raises(ValueError, match="heads must be None where q has no dimension of heads"):
        attention_map(X["q"][0, 0], X["k"][0, 0], X["lse"][0, 0], heads=[0])


def test_unsupported_lists_every_reason():
    x = {n: t.double() for n, t in X.items()}
    with pytest.raises(NotImplementedError, match=r"cpu: needs float32.*got float64"):
        attention_map(**x, backend="cpu")
    assert attention_map(**x).dtype is torch.float64


def test_exported():
    assert fasttx.attention_map is attention_map
