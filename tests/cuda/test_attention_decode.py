"""attention_decode's and cache_append's CUDA kernels in the emulator: the cases of tests/ops
against fp64; their traffic."""

import functools

import pytest
import torch

import fasttx
from fasttx.ops.attention_decode import attention_decode_fwd, cache_append_inplace
from fasttx.testing import check, guarded_outputs
from tests.ops import test_attention_decode as ops
from tests.ops.test_attention_decode import CASES, alibi, cached, ints, table

from .cases import HALF, selected
from .emulated import mode, traffic

# Heads whose rows lie by 16 bytes, at the sizes at which another kernel begins.
MORE = {
    "by eight, D 64": (cached(2, 6, 2, S=2, D=64, T=150), {}),
    "by eight, D 72, Dv 128": (cached(1, 4, 1, D=72, Dv=128, T=90), {"softcap": 4.0}),
    "by eight, D 136, Dv 16": (cached(1, 3, 3, S=3, D=136, Dv=16, T=40), {"window": (20, None)}),
    "by eight, 40 rows": (cached(1, 10, 1, S=4, D=32, T=70, page=8), alibi(10)),
    "by eight, several splits": (cached(1, 4, 1, S=2, D=64, T=1500), table(4, 32, 128)),
    "by eight, splits with nothing": (
        cached(2, 4, 2, S=2, D=16, T=1500, lengths=[40, 0]),
        {"cache_start": ints(9, 0)},
    ),
}
ALL = {**CASES, **{name: (*case, {}) for name, case in MORE.items()}}
QUICK = {*ops.FEW, *MORE, "head size 256", "empty cache", "everything", "strided", "no queries"}


@pytest.mark.parametrize(("dtype", "name"), list(selected(((name, name) for name in ALL), QUICK)))
def test_against_fp64(dtype, name):
    inputs, options, layouts = ALL[name]
    with mode(seed=len(name) % 3):
        check(
            functools.partial(fasttx.attention_decode, **options, backend="cuda"),
            functools.partial(fasttx.attention_decode, **options, backend="reference"),
            functools.partial(ops._plain, options, dtype), inputs, dtype=dtype, layouts=layouts,
        )  # fmt: skip


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("D", [16, 33])
def test_hidden_values_reach_nothing(poison, D):
    x = {n: t.bfloat16() if t.is_floating_point() else t for n, t in cached(S=3, D=D).items()}
    options = {"cache_start": ints(4, 8), "window": (11, None), "backend": "cuda"}
    expected = fasttx.attention_decode(**x, **options)
    dirty = {n: t.clone() for n, t in x.items()}
    caches = [dirty[n] for n in ("k_cache", "v_cache")]
    for b, length in enumerate(x["cache_lengths"].tolist()):
        for cache in caches:
            cache[b, :, : length - 3 - 11] = poison
            cache[b, :, length:] = poison
    assert torch.equal(fasttx.attention_decode(**dirty, **options), expected)
    # The newest key and value are hidden from all but the newest query: its block is careful.
    for cache in caches:
        cache[0, :, 49] = poison
    out = fasttx.attention_decode(**dirty, **options)
    # Careful rows round no probability to 16 bits.
    torch.testing.assert_close(out[0, :, :2], expected[0, :, :2], atol=4e-3, rtol=1e-2)
    assert torch.equal(out[1], expected[1])
    assert not out[0, :, 2].isfinite().any()


def test_splits_and_careful_rows_agree():
    """The same sums, with infinity in a value that one query of two sees."""
    q, k, v = (t.bfloat16() for t in (ops.random(1, 2, 2, 32), *2 * [ops.random(1, 1, 700, 32)]))
    args = (ints(700), *[None] * 6, 0.2, 0.0, -1, 0)
    clean = attention_decode_fwd(q, k, v, *args, backend="cuda")
    v[0, 0, 699, 5] = torch.inf
    out = attention_decode_fwd(q, k, v, *args, backend="cuda")
    other = [d for d in range(32) if d != 5]
    torch.testing.assert_close(out[:, :, 0], clean[:, :, 0], atol=4e-3, rtol=1e-2)
    torch.testing.assert_close(out[:, :, 1, other], clean[:, :, 1, other], atol=4e-3, rtol=1e-2)
    assert (out[:, :, 1, 5] == torch.inf).all()


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("D", [16, 10])
def test_kernels_stay_in_bounds(page, D):
    """Values that the door would refuse, given to the inner ops."""
    x = cached(3, S=2, T=12, D=D, page=page)
    q, k_cache, v_cache = (x[n].bfloat16() for n in ("q", "k_cache", "v_cache"))
    lengths, start, blocks = ints(-5, 10**9, 12), ints(-9, 0, 10**9), x.get("block_table")
    if page:
        blocks[1, 0], blocks[1, 1] = -1, 10**6
    rest = (*[None] * 4, 0.25, 0.0, -1, 0)
    with guarded_outputs():
        out = attention_decode_fwd(
            q, k_cache, v_cache, lengths, start, blocks, *rest, backend="cuda"
        )
    assert not out[0].any() and not out[2].any() and out[1].isfinite().all()
    before = k_cache.clone(), v_cache.clone()
    new = torch.ones(3, 2, 2, D).bfloat16()
    cache_append_inplace(k_cache, v_cache, new, new, ints(-1, 10**9, 13), blocks, backend="cuda")
    changed = (k_cache != before[0]).any(-1).any(1)
    assert changed.sum() == (v_cache != before[1]).any(-1).any(1).sum() == 1


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("page", [None, 5])
def test_append(layout, page):
    for dtype in HALF:
        ops.test_append("cuda", dtype, layout, page)


def test_append_by_eight():
    for page in (None, 8):
        x = cached(2, 2, 2, T=32, D=24, Dv=40, page=page)
        fresh = [ops.random(2, 2, 3, d, seed=d).bfloat16() for d in (24, 40)]
        found = []
        for backend in ("cuda", "reference"):
            caches = [x[n].bfloat16() for n in ("k_cache", "v_cache")]
            rest = (ints(32, 2), x.get("block_table"))
            cache_append_inplace(*caches, *fresh, *rest, backend=backend)
            found.append(caches)
        assert all(map(torch.equal, *found))


def test_schedules_give_the_same_bits():
    x = {n: t.bfloat16() if t.is_floating_point() else t for n, t in cached(S=2, T=700).items()}
    results = []
    for eager, seed in ((False, 0), (True, 1), (False, 2)):
        with mode(eager, seed):
            results.append(fasttx.attention_decode(**x, backend="cuda"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("group", [1, 8])
def test_keys_and_values_move_once(group):
    """For all the heads that share them, and only those that a query sees."""
    T, D, window = 640, 64, 300
    q = torch.randn(1, group, 1, D).bfloat16()
    k, v = torch.randn(2, 1, 1, T, D).bfloat16()
    for left, keys in ((-1, T), (window, window + 1)):
        traffic()
        attention_decode_fwd(q, k, v, ints(T), *[None] * 6, 0.1, 0.0, left, 0, backend="cuda")
        seen = traffic()
        moved = 2 * keys * D * 2
        blocks = 3 * 3  # on the emulator's three multiprocessors
        # Each block reads the queries and the length; the splits' sums are written and read again.
        beside = blocks * (group * D * 2 + 128 * 4) + group * blocks * (D + 2 * 32) * 4
        assert moved <= seen.read <= moved + beside
        assert seen.written <= group * D * 2 + group * blocks * (D + 2) * 4
    traffic()
    cache_append_inplace(k, v, k[:, :, :5], v[:, :, :5], ints(9), None, backend="cuda")
    seen = traffic()
    assert seen.written == 2 * 5 * D * 2 and seen.read == seen.written + 2 * 5 * D // 8 * 4
