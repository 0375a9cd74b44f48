"""attention_decode and cache_append on every backend and dtype, against fp64 and each other."""
# ruff: noqa: E501 (tables, one case a line)

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fasttx
from fasttx import ALiBi, RelativePositionBias
from fasttx.ops._attention_decode_checks import checked_decode
from fasttx.ops.attention_decode import attention_decode_fwd, cache_append_inplace
from fasttx.reference.attention_decode import attention_decode_math
from fasttx.testing import check, guarded_outputs, lay_out, recorded_calls
from tests.ops.contract import BACKENDS, DTYPES, backend_fixture, parameter, refused, skip_unusable

pytestmark = pytest.mark.filterwarnings("ignore:fasttx.attention_decode runs on the plain")


backend = backend_fixture("attention_decode_fwd")


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cached(B=2, H=4, G=2, S=1, T=50, D=16, Dv=None, lengths=None, page=None):
    """fp64 inputs; with page the caches are pages in a shuffled order, and one is nobody's."""
    Dv = D if Dv is None else Dv
    x = {"q": random(B, H, S, D)}
    x["cache_lengths"] = ints(*(lengths or [max(0, T - 7 * b) for b in range(B)]))
    if page is None:
        return x | {"k_cache": random(B, G, T, D, seed=1), "v_cache": random(B, G, T, Dv, seed=2)}
    n = -(-T // page)
    order = torch.randperm(B * n + 1, generator=torch.Generator().manual_seed(3))[: B * n]
    x["block_table"] = order.view(B, n).int()
    shape = (B * n + 1, G, page)
    return x | {"k_cache": random(*shape, D, seed=1), "v_cache": random(*shape, Dv, seed=2)}


def alibi(H, **kwargs):
    return {"position_bias": ALiBi(ALiBi.standard_slopes(H), **kwargs)}


def table(H, buckets=8, reach=12):
    return {
        "position_bias": RelativePositionBias(
            random(buckets, H, seed=4).float(), bidirectional=False, max_distance=reach
        )
    }


FEW = {
    "one query": (cached(), {}),
    "several queries": (cached(S=5), {}),
    "sizes 1": (cached(1, 1, 1, 1, 1, 1), {}),
    "no keys yet": (cached(3, lengths=[0, 50, 1]), {}),
    "shorter than the queries": (cached(S=6, lengths=[3, 50]), {}),
    "odd head sizes": (cached(D=33, Dv=7, T=71), {}),
    "pages of 16": (cached(T=96, page=16, lengths=[90, 33]), {}),
    "pages of 5, several queries": (cached(S=3, page=5), {}),
    "left padding, window, softcap": (cached(S=3), {"cache_start": ints(4, 40), "window": (9, None), "softcap": 3.0}),
    "not causal, window": (cached(S=4), {"is_causal": False, "window": (20, 2)}),
    "alibi": (cached(S=2), alibi(4)),
    "relative": (cached(S=2, T=90), table(4)),
}  # fmt: skip
MORE = {
    "no queries": (cached(S=0), {}),
    "no batch": (cached(0), {}),
    "empty cache": (cached(T=0), {}),
    "no value columns": (cached(Dv=0), {}),
    "head size 1": (cached(D=1, S=3), {}),
    "head size 64": (cached(1, 12, 12, D=64, T=300), {}),
    "head size 128, many queries": (cached(1, 8, 1, S=9, D=128, T=260), {}),
    "head size 256": (cached(1, 2, 1, D=256, Dv=250, T=40), {}),
    "several splits": (cached(2, 2, 1, D=24, T=1700), {}),
    "several splits of many rows": (cached(1, 4, 1, S=6, D=24, T=1700), {}),
    "several splits, pages of 7": (cached(1, 2, 1, S=2, D=20, T=1300, page=7), {}),
    "many batches": (cached(11, 2, 2, T=80), {}),
    "not causal": (cached(S=7), {"is_causal": False}),
    "negative scale": (cached(S=2), {"scale": -0.7}),
    "scale 0": (cached(), {"scale": 0.0}),
    "start at the end": (cached(), {"cache_start": ints(50, 43)}),
    "window of one": (cached(S=4), {"window": (0, 0)}),
    "alibi, positions": (cached(S=2), alibi(4, positions=torch.arange(100).view(2, 50) % 37)),
    "alibi, slopes [B, H], pages": (cached(page=10), {"position_bias": ALiBi(random(2, 4, seed=9).float())}),
    "relative, far and near, pages": (cached(S=3, T=200, page=8), table(4, 32, 128)),
    "relative, short reach, both sides": (cached(S=9), {"is_causal": False, "position_bias": RelativePositionBias(random(8, 4).float(), max_distance=5)}),
    "everything": (cached(3, 6, 2, S=3, T=90, D=20, Dv=12, page=6), {"cache_start": ints(3, 0, 70), "window": (30, None), "softcap": 2.0, "scale": 0.3, **table(6)}),
}  # fmt: skip
LAID = ("q", "k_cache", "v_cache")
LAYOUTS = {
    layout: (cached(2, 2, 2, S=3, T=20), {}, dict.fromkeys(LAID, layout))
    for layout in ("transposed", "sliced", "strided")
}
_one = cached(2, 2, 2, S=3, T=20)
_same = {n: t[:1].expand(t.shape) if n in LAID else t for n, t in _one.items()}
LAYOUTS["expanded"] = (_same, {}, dict.fromkeys(LAID, "expanded"))
CASES = {name: (*case, {}) for name, case in (FEW | MORE).items()} | LAYOUTS


def _plain(options, dtype, **x):
    named = dict.fromkeys(
        ("cache_start", "block_table", "position_bias", "window", "scale", "softcap", "backend")
    )
    arguments = checked_decode(**named | {"is_causal": True} | options | x)
    return attention_decode_math(*arguments, compute=dtype)


def _selected():
    for backend, case, dtype in itertools.product((*BACKENDS, "torch"), CASES, DTYPES):
        slow = backend == "triton" and (dtype is torch.float16 or case not in FEW)
        yield parameter(backend, dtype, case, slow=slow)


@pytest.mark.parametrize(("name", "dtype", "case"), list(_selected()))
def test_against_fp64(name, dtype, case):
    skip_unusable("attention_decode_fwd", name)
    inputs, options, layouts = CASES[case]
    if name == "torch" and {"block_table", "softcap", "position_bias"} & {*inputs, *options}:
        x = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
        with pytest.raises(NotImplementedError, match="torch: does not support"):
            fasttx.attention_decode(**x, **options, backend=name)
        return
    check(
        functools.partial(fasttx.attention_decode, **options, backend=name),
        functools.partial(fasttx.attention_decode, **options, backend="reference"),
        functools.partial(_plain, options, dtype),
        inputs,
        dtype=dtype,
        layouts=layouts,
    )


def test_reference_is_attention_and_sdpa():
    """The authority itself: attention over each sequence's own keys, and PyTorch's."""
    x = cached(3, 4, 2, S=3, T=40)
    start, bias = ints(5, 0, 9), table(4)["position_bias"]
    got = fasttx.attention_decode(
        **x, cache_start=start, softcap=2.0, position_bias=bias, backend="reference"
    )
    for b in range(3):
        keys = slice(int(start[b]), int(x["cache_lengths"][b]))
        k, v = x["k_cache"][b : b + 1, :, keys], x["v_cache"][b : b + 1, :, keys]
        expected = fasttx.attention(
            x["q"][b : b + 1],
            k,
            v,
            is_causal="lower_right",
            softcap=2.0,
            position_bias=bias,
            backend="reference",
        )
        torch.testing.assert_close(got[b : b + 1], expected)
    got = fasttx.attention_decode(
        x["q"][:1, :, :1], x["k_cache"][:1], x["v_cache"][:1], ints(40), backend="reference"
    )
    expected = F.scaled_dot_product_attention(
        x["q"][:1, :, :1], x["k_cache"][:1], x["v_cache"][:1], enable_gqa=True
    )
    torch.testing.assert_close(got, expected)


def test_pages_are_the_same_cache(backend):
    """A paged cache and the same keys in one piece."""
    paged = {
        n: t.float() if t.is_floating_point() else t for n, t in cached(S=2, T=96, page=16).items()
    }
    whole = {n: t for n, t in paged.items() if n != "block_table"}
    for name in ("k_cache", "v_cache"):
        whole[name] = paged[name][paged["block_table"].long()].transpose(1, 2).flatten(2, 3)
    got = fasttx.attention_decode(**paged, backend=backend)
    torch.testing.assert_close(got, fasttx.attention_decode(**whole, backend=backend))


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_hidden_values_reach_nothing(backend, poison):
    skip_unusable("attention_decode_fwd", backend)
    x = {n: t.float() if t.is_floating_point() else t for n, t in cached(S=3).items()}
    options = {"cache_start": ints(4, 8), "window": (11, None), "backend": backend}
    expected = fasttx.attention_decode(**x, **options)
    dirty = {n: t.clone() for n, t in x.items()}
    for b, length in enumerate(x["cache_lengths"].tolist()):
        for name in ("k_cache", "v_cache"):
            dirty[name][b, :, : length - 3 - 11] = poison
            dirty[name][b, :, length:] = poison
    torch.testing.assert_close(fasttx.attention_decode(**dirty, **options), expected)
    # The newest key and value are hidden from all but the newest query.
    for name in ("k_cache", "v_cache"):
        dirty[name][0, :, 49] = poison
    out = fasttx.attention_decode(**dirty, **options)
    torch.testing.assert_close(out[0, :, :2], expected[0, :, :2])
    torch.testing.assert_close(out[1], expected[1])
    assert not out[0, :, 2].isfinite().any()


def test_unused_entries_of_the_block_table_are_not_read(backend):
    x = {
        n: t.float() if t.is_floating_point() else t
        for n, t in cached(T=96, page=16, lengths=[33, 20]).items()
    }
    options = {"cache_start": ints(0, 17), "backend": backend}
    expected = fasttx.attention_decode(**x, **options)
    x["block_table"][0, 3:], x["block_table"][1, 2:], x["block_table"][1, 0] = -1, 10**9, -7
    assert torch.equal(fasttx.attention_decode(**x, **options), expected)


@pytest.mark.parametrize("page", [None, 4])
def test_kernels_stay_in_bounds(backend, page):
    """Values that the door would refuse, given to the inner ops."""
    x = cached(3, S=2, T=12, page=page)
    q, k_cache, v_cache = (x[n].float() for n in ("q", "k_cache", "v_cache"))
    lengths, start, blocks = ints(-5, 10**9, 12), ints(-9, 0, 10**9), x.get("block_table")
    if page:
        blocks[1, 0], blocks[1, 1] = -1, 10**6
    with guarded_outputs():
        out = attention_decode_fwd(
            q,
            k_cache,
            v_cache,
            lengths,
            start,
            blocks,
            *[None] * 4,
            0.25,
            0.0,
            -1,
            0,
            backend=backend,
        )
    assert not out[0].any() and not out[2].any() and out[1].isfinite().all()
    before = k_cache.clone(), v_cache.clone()
    new = torch.ones(3, 2, 2, 16)
    cache_append_inplace(k_cache, v_cache, new, new, ints(-1, 10**9, 13), blocks, backend=backend)
    changed = (k_cache != before[0]).any(-1).any(1)
    assert changed.sum() == (v_cache != before[1]).any(-1).any(1).sum() == 1


def test_threads_do_not_change_bits():
    x = {
        n: t.bfloat16() if t.is_floating_point() else t
        for n, t in cached(2, 4, 2, S=2, T=2100, D=32).items()
    }
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            found.append(fasttx.attention_decode(**x))
    finally:
        torch.set_num_threads(threads)
    alone = fasttx.attention_decode(**{n: t[:1] for n, t in x.items()})
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0][:1], alone)


@pytest.mark.parametrize(
    "isa", [pytest.param(i, marks=pytest.mark.slow) for i in ("default", "avx512")] + ["avx2"]
)
def test_every_instruction_set(isa):
    code = (
        "import torch, fasttx, sys\ng = torch.Generator().manual_seed(0)\nworst = 0\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in ((2, 4, 3, 40), (2, 2, 700, 40), (2, 2, 700, 72)))\n"
        "    n = torch.tensor([700, 13], dtype=torch.int32)\n"
        "    got = fasttx.attention_decode(q, k, v, n, backend='cpu')\n"
        "    want = fasttx.attention_decode(q.double(), k.double(), v.double(), n, backend='reference')\n"
        "    worst = max(worst, ((got - want).abs().max() / torch.finfo(dtype).eps).item())\n"
        "assert worst < 20, worst\n"
    )
    skip_unusable("attention_decode_fwd", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FASTTX_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_opcheck():
    for case in ("several queries", "pages of 16", "relative", "left padding, window, softcap"):
        inputs, options, _ = CASES[case]
        inputs = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
        with recorded_calls() as calls:
            fasttx.attention_decode(**inputs, **options)
        for op, args, _ in calls:
            torch.library.opcheck(op.overload, args, {"backend": None})
    cache = torch.randn(2, 2, 9, 4)
    args = (
        cache,
        cache.clone(),
        torch.randn(2, 2, 3, 4),
        torch.randn(2, 2, 3, 4),
        ints(9, 4),
        None,
    )
    torch.library.opcheck(cache_append_inplace.overload, args, {"backend": None})


def _decode_step(q, k, v, k_cache, v_cache, lengths):
    fasttx.cache_append(k_cache, v_cache, k, v, lengths)
    return fasttx.attention_decode(
        q, k_cache, v_cache, lengths, position_bias=ALiBi(torch.full((4,), 0.1))
    )


def test_compile():
    compiled = torch.compile(_decode_step, fullgraph=True, backend="aot_eager")
    x = {n: t.float() if t.is_floating_point() else t for n, t in cached(S=2).items()}
    caches = [[x["k_cache"].clone(), x["v_cache"].clone()] for _ in range(2)]
    k, v = random(2, 2, 2, 16, seed=7).float(), random(2, 2, 2, 16, seed=8).float()
    with torch.no_grad():
        expected = _decode_step(x["q"], k, v, *caches[0], x["cache_lengths"])
        got = compiled(x["q"], k, v, *caches[1], x["cache_lengths"])
    torch.testing.assert_close(got, expected)
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("page", [None, 5])
def test_append(backend, dtype, layout, page):
    """Each new token at its place, nothing else touched: against a loop over tokens."""
    B, G, S, T = 3, 2, 4, 30
    x = cached(B, 2, G, T=T, D=6, Dv=3, page=page)
    blocks = x.get("block_table")
    lengths = ints(30, 4, 2)
    fresh = [random(B, G, S, d, seed=d).to(dtype) for d in (6, 3)]
    caches = [x[n].to(dtype) for n in ("k_cache", "v_cache")]
    expected = [c.clone() for c in caches]
    for b in range(B):
        for s in range(S):
            place = int(lengths[b]) - S + s
            if place < 0:
                continue
            owner, at = (
                (b, place) if page is None else (int(blocks[b, place // page]), place % page)
            )
            for cache, new in zip(expected, fresh, strict=True):
                cache[owner, :, at] = new[b, :, s]
    caches, fresh = [lay_out(c, layout) for c in caches], [lay_out(t, layout) for t in fresh]
    versions = [c._version for c in caches]
    assert (
        fasttx.cache_append(*caches, *fresh, lengths, block_table=blocks, backend=backend) is None
    )
    for cache, want, version in zip(caches, expected, versions, strict=True):
        assert torch.equal(cache, want)
        assert cache._version > version


def test_append_then_decode_is_attention(backend):
    """A sequence fed token by token gives the rows of causal attention over the whole."""
    q, k, v = (random(2, 2, 9, 8, seed=n).float() for n in range(3))
    k_cache, v_cache = torch.full((2, 2, 16, 8), torch.nan), torch.full((2, 2, 16, 8), torch.nan)
    expected = fasttx.attention(q, k, v, is_causal=True, backend="reference")
    done = 0
    for size in (5, 1, 1, 2):
        done += size
        new, lengths = slice(done - size, done), ints(done, done)
        fasttx.cache_append(k_cache, v_cache, k[:, :, new], v[:, :, new], lengths, backend=backend)
        out = fasttx.attention_decode(q[:, :, new], k_cache, v_cache, lengths, backend=backend)
        torch.testing.assert_close(out, expected[:, :, new])


def test_autocast_takes_the_caches_dtype():
    x = {n: t.float() if t.is_floating_point() else t for n, t in cached().items()}
    caches = [x["k_cache"].bfloat16(), x["v_cache"].bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        fasttx.cache_append(
            *caches, *(random(2, 2, 1, 16).float() for _ in range(2)), x["cache_lengths"]
        )
        out = fasttx.attention_decode(x["q"], *caches, x["cache_lengths"])
    assert out.dtype is torch.bfloat16


def test_a_training_step_sees_that_the_cache_changed():
    cache, weight = torch.randn(1, 1, 4, 2), torch.randn(2, requires_grad=True)
    loss = (cache * weight).sum()
    fasttx.cache_append(
        cache, torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), ints(3)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        cache = torch.zeros(1, 1, 4, 2)
        fasttx.cache_append(
            cache, cache.clone(), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), ints(3)
        )
    assert cache[0, 0, 2].tolist() == [1, 1]


def test_large_offsets():
    """Elements of a cache beyond 2^31 from its start, by strides."""
    T = 70
    memory = torch.empty(2**31 + 100, dtype=torch.bfloat16)  # its pages are made when touched
    step = 2**31 // (T - 1)
    k_cache = memory.as_strided((1, 1, T, 8), (1, 1, step, 1))
    new = torch.randn(1, 1, T, 8, dtype=torch.bfloat16)
    q = torch.randn(1, 1, 1, 8, dtype=torch.bfloat16)
    fasttx.cache_append(k_cache, k_cache, new, new, ints(T), backend="cpu")
    got = fasttx.attention_decode(q, k_cache, k_cache, ints(T), backend="cpu")
    assert torch.equal(got, fasttx.attention_decode(q, new, new, ints(T), backend="cpu"))


Q, CACHE, LENGTHS = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 20, 8), ints(20, 12)
PAGES = {
    "k_cache": torch.randn(6, 2, 4, 8),
    "v_cache": torch.randn(6, 2, 4, 8),
    "block_table": torch.arange(6).view(2, 3).int(),
}
NAN = float("nan")
BAD = {
    "not a tensor": (TypeError, "q must be a tensor, got list", {"q": [1.0]}),
    "int q": (TypeError, "q must be float32.*got int64", {"q": Q.long()}),
    "rank": (ValueError, r"q must be \[B, H, S, D\], got shape \(4, 3, 8\)", {"q": Q[0]}),
    "cache type": (TypeError, "v_cache must be a tensor, got NoneType", {"v_cache": None}),
    "cache rank": (ValueError, r"k_cache must be \[B, G, T_max, D\], got shape \(2, 20, 8\)", {"k_cache": CACHE[:, 0]}),
    "dtypes differ": (TypeError, "q must have k_cache's dtype float16, got float32", {"k_cache": CACHE.half(), "v_cache": CACHE.half()}),
    "cache dtypes": (TypeError, "v_cache must have k_cache's dtype float32, got float16", {"v_cache": CACHE.half()}),
    "devices": (ValueError, "k_cache must be on q's device cpu, got meta", {"k_cache": CACHE.to("meta")}),
    "head sizes": (ValueError, "q must have k_cache's head size 4", {"k_cache": CACHE[..., :4]}),
    "head size 0": (ValueError, "q must have k_cache's head size 0, at least 1", {"q": Q[..., :0], "k_cache": CACHE[..., :0]}),
    "cache lengths": (ValueError, r"v_cache must be \[2, 2, 20\] and a head size, as k_cache, got shape \(2, 2, 19, 8\)", {"v_cache": CACHE[:, :, :19]}),
    "batches": (ValueError, r"k_cache must have a batch of 2, got shape \(1, 2, 20, 8\)", {"k_cache": CACHE[:1], "v_cache": CACHE[:1]}),
    "heads": (ValueError, "k_cache must have a number of heads that divides q's 4, got 0", {"k_cache": CACHE[:, :0], "v_cache": CACHE[:, :0]}),
    "lengths type": (TypeError, r"cache_lengths must be an int32 tensor \[B\], got list", {"cache_lengths": [20, 12]}),
    "lengths dtype": (TypeError, "cache_lengths must be int32, got int64", {"cache_lengths": LENGTHS.long()}),
    "lengths shape": (ValueError, r"cache_lengths must be \[2\], got shape \(3,\)", {"cache_lengths": ints(1, 2, 3)}),
    "too long": (ValueError, r"cache_lengths must lie in \[0, T_max = 20\], got 21 at 1", {"cache_lengths": ints(20, 21)}),
    "negative length": (ValueError, "cache_lengths must lie in .* got -1 at 0", {"cache_lengths": ints(-1, 12)}),
    "start dtype": (TypeError, "cache_start must be int32, got int64", {"cache_start": LENGTHS.long()}),
    "start shape": (ValueError, r"cache_start must be \[2\], got shape \(1,\)", {"cache_start": ints(1)}),
    "start beyond": (ValueError, r"cache_start must lie in \[0, cache_lengths\], got 13 at 1, where cache_lengths is 12", {"cache_start": ints(0, 13)}),
    "start negative": (ValueError, "cache_start must lie in .* got -2 at 0", {"cache_start": ints(-2, 0)}),
    "table type": (TypeError, r"block_table must be an int32 tensor \[B, n\] or None, got list", {**PAGES, "block_table": [[0]]}),
    "table dtype": (TypeError, "block_table must be int32, got int64", {**PAGES, "block_table": PAGES["block_table"].long()}),
    "table shape": (ValueError, r"block_table must be \[2, n\], got shape \(1, 3\)", {**PAGES, "block_table": PAGES["block_table"][:1]}),
    "beyond the table": (ValueError, r"cache_lengths must lie in \[0, n \* page = 3 \* 4 = 12\], got 13 at 0", {**PAGES, "cache_lengths": ints(13, 12)}),
    "no such page": (ValueError, r"block_table must hold pages in \[0, 6\) where cache_lengths need one, got 6 at \[1, 2\]", {**PAGES, "cache_lengths": ints(12, 9), "block_table": torch.tensor([[0, 1, 2], [3, 4, 6]]).int()}),
    "negative page": (ValueError, r"got -1 at \[0, 0\]", {**PAGES, "cache_lengths": ints(12, 9), "block_table": torch.tensor([[-1, 1, 2], [3, 4, 5]]).int()}),
    "empty pages": (ValueError, "k_cache must have pages of at least 1 position", {**PAGES, "k_cache": PAGES["k_cache"][:, :, :0], "v_cache": PAGES["v_cache"][:, :, :0]}),
    "causal": (TypeError, "is_causal must be True or False, got 'lower_right'", {"is_causal": "lower_right"}),
    "window": (ValueError, r"window must hold two of int >= 0 or None \(unbounded\), got \(-1, 0\)", {"window": (-1, 0)}),
    "scale": (ValueError, "scale must be a finite number or None, got nan", {"scale": NAN}),
    "softcap": (ValueError, "softcap must be a finite number above 0 or None, got 0.0", {"softcap": 0.0}),
    "bias type": (TypeError, "position_bias must be fasttx.ALiBi, .* got Tensor", {"position_bias": Q}),
    "slopes": (ValueError, r"position_bias.slopes must be \[4\] or \[2, 4\], got shape \(3,\)", {"position_bias": ALiBi(torch.ones(3))}),
    "positions": (ValueError, r"position_bias.positions must be \[20\] or \[2, 20\]", {"position_bias": ALiBi(torch.ones(4), torch.arange(5))}),
    "table heads": (ValueError, r"position_bias.weight must be \[buckets, 4\], got shape \(32, 2\)", {"position_bias": RelativePositionBias(torch.ones(32, 2))}),
    "query_offset": (ValueError, "position_bias.query_offset must be None, got 3", {"position_bias": RelativePositionBias(torch.ones(32, 4), query_offset=3)}),
    "backend": (ValueError, "backend must be None or one of cpu, cuda, triton, reference, torch, got 'cudnn'", {"backend": "cudnn"}),
    "grad q": (ValueError, "q must not require grad, .* attention_decode has no gradient", {"q": Q.clone().requires_grad_()}),
    "grad cache": (ValueError, "v_cache must not require grad", {"v_cache": CACHE.clone().requires_grad_()}),
    "grad table": (ValueError, "position_bias.weight must not require grad", {"position_bias": RelativePositionBias(torch.ones(32, 4, requires_grad=True))}),
}  # fmt: skip
NEW = torch.randn(2, 2, 3, 8)
BAD_APPEND = {
    "k shape": (ValueError, r"k must be \(2, 2, 3, 8\) to fit k_cache, got \(2, 1, 3, 8\)", {"k": NEW[:, :1]}),
    "v shape": (ValueError, r"v must be \(2, 2, 3, 8\) to fit v_cache, got \(2, 2, 2, 8\)", {"v": NEW[:, :, :2]}),
    "k type": (TypeError, "k must be a tensor, got list", {"k": [1]}),
    "k dtype": (TypeError, "k must have k_cache's dtype float32, got float16", {"k": NEW.half()}),
    "k device": (ValueError, "k must be on k_cache's device cpu, got meta", {"k": NEW.to("meta")}),
    "too long": (ValueError, r"cache_lengths must lie in \[0, T_max = 20\], got 21 at 0", {"cache_lengths": ints(21, 4)}),
    "negative": (ValueError, "cache_lengths must lie in .* got -3 at 1", {"cache_lengths": ints(3, -3)}),
    "no such page": (ValueError, r"block_table must hold pages in \[0, 6\) .* got 7 at \[1, 1\]", {**PAGES, "cache_lengths": ints(3, 7), "block_table": torch.tensor([[0, 9, 9], [9, 7, 9]]).int()}),
    "grad cache": (ValueError, "k_cache must not require grad", {"k_cache": CACHE.clone().requires_grad_()}),
    "grad k": (ValueError, "k must not require grad", {"k": NEW.clone().requires_grad_()}),
    "expanded cache": (ValueError, r"v_cache must have memory of its own for every element, got shape \(2, 2, 20, 8\) with strides", {"v_cache": CACHE[:1].expand(2, -1, -1, -1)}),
    "backend": (ValueError, "backend must be None or one of", {"backend": "torch"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    refused(
        monkeypatch, fasttx.attention_decode, BAD[name],
        q=Q, k_cache=CACHE, v_cache=CACHE, cache_lengths=LENGTHS,
    )  # fmt: skip


@pytest.mark.parametrize("name", BAD_APPEND)
def test_bad_append(name, monkeypatch):
    refused(
        monkeypatch, fasttx.cache_append, BAD_APPEND[name],
        k_cache=CACHE, v_cache=CACHE.clone(), k=NEW, v=NEW, cache_lengths=LENGTHS,
    )  # fmt: skip


def test_no_grad_allows_parameters():
    bias = RelativePositionBias(torch.ones(32, 4, requires_grad=True))
    with torch.no_grad():
        out = fasttx.attention_decode(Q, CACHE, CACHE, LENGTHS, position_bias=bias)
    assert not out.requires_grad
