"""attention's forward for sm_90a in the emulator: the cases of tests/ops against fp64, long ones
under several schedules, what is hidden, and planted bugs."""
# ruff: noqa: E501 (a table, one case a line)

import functools

import pytest
import torch

import fasttx
from tests.ops.attention_cases import Case, additive, padding, qkv, random, relative

from .attention import CAUSAL, DROP, LOWER, alibi, by_name, held, planted_kernels, selected
from .cases import MODES
from .emulated import card, library, mode
from .planted import Bug, Planted


def long(B=1, H=2, S=200, T=330, D=64, **more):
    return qkv(B=B, H=H, S=S, T=T, D=D, **more)


# Several tiles a block of threads, several blocks of keys a tile.
LONG = [
    Case("64", long(H=4, S=400, T=520)),
    Case("64, causal", long(H=3, S=400, T=400), CAUSAL),
    Case("64, lower right", long(S=250, T=520, G=1), LOWER),
    Case("64, window", long(S=500, T=500), {"window": (70, 9)}),
    Case("128", long(H=3, D=128)),
    Case("128, causal", long(S=300, T=300, D=128), CAUSAL),
    Case("96 and 72, grouped", long(H=4, G=2, S=150, D=96, Dv=72), CAUSAL),
    Case("few keys", long(S=70, T=3)),
    Case("256", long(S=150, T=200, D=256)),
    Case("200 and 40, window", long(S=150, T=200, D=200, Dv=40), {"window": (50, 20)}),
    Case("packed", long(S=410, T=410), {"cu_seqlens": torch.tensor([0, 64, 64, 195, 400]), **CAUSAL}),
    Case("packed, 128", long(S=330, T=260, D=128), {"cu_seqlens": (torch.tensor([0, 1, 200, 330]), torch.tensor([0, 130, 130, 260]))}),
    Case("relative", {**long(S=300, T=300), "table": random(32, 2)}, {}, (), relative()),
    Case("relative and padding", {**long(B=3, S=100, T=400), "table": random(32, 2), "attn_mask": padding(3, 400)}, {}, (), relative()),
    Case("relative, 128", {**long(S=150, D=128), "table": random(32, 2)}, LOWER, (), relative(bidirectional=False)),
    Case("ALiBi, 128", {**long(S=300, T=300, D=128), "slopes": fasttx.ALiBi.standard_slopes(2)}, CAUSAL, (), alibi, ("slopes",)),
    Case("padding", {**long(B=3, S=150, T=300), "attn_mask": padding(3, 300)}),
    Case("a sequence of padding first, 128", {**long(B=3, S=100, T=200, D=128), "attn_mask": padding(3, 200).flip(0)}),
    Case("float mask", {**long(B=2, S=200, T=200), "attn_mask": additive(2, 1, 200, 200)}, {"softcap": 4.0}),
    Case("float mask, 128", {**long(S=150, T=200, D=128), "attn_mask": additive(1, 2, 150, 200)}, LOWER),
    Case("float mask, 256", {**long(S=100, T=150, D=256), "attn_mask": additive(1, 1, 100, 150)}),
    Case("dropout", long(H=3, S=200, T=300), DROP),
    Case("dropout, 128", {**long(S=150, T=200, D=128), "attn_mask": additive(1, 2, 150, 200)}, {**DROP, **CAUSAL}),
    Case("dropout, 256", long(S=100, T=150, D=256), DROP),
]  # fmt: skip
QUICK = {"plain", "one query", "causal", "lower right, S > T", "window and softcap, grouped"}
QUICK |= {"padding", "bool mask with empty rows", "float mask [1,H,S,T]", "ALiBi", "packed"}
QUICK |= {"relative, causal, dropout", "packed cross, dropout", "head size 256", "every layout"}
QUICK |= {"wide value, odd head", "rows of finite minima", "everything", "negative scale"}


@pytest.mark.parametrize(
    ("dtype", "case", "schedule"), list(selected(LONG, QUICK, {c.name for c in LONG[::3]}))
)
def test_against_fp64(dtype, case, schedule):
    with card(90), mode(*schedule):
        held(case, dtype, gradients=False)


@pytest.mark.parametrize("name", ["64, causal", "128", "packed", "relative, 128", "dropout"])
def test_schedules_give_the_same_bits(name):
    case = by_name(LONG, name)
    inputs = {n: t.bfloat16() if t.is_floating_point() else t for n, t in case.inputs.items()}
    inputs |= {n: case.inputs[n] for n in case.keep}
    results = []
    for schedule in MODES[::2]:
        with card(90), mode(*schedule):
            results.append(case.function("cuda")(**inputs))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def poisoned(t, where, value):
    t = t.clone()
    t[where] = value
    return t


@pytest.mark.parametrize(
    ("D", "value"),
    [
        (64, torch.nan),
        pytest.param(64, torch.inf, marks=pytest.mark.slow),
        pytest.param(128, torch.nan, marks=pytest.mark.slow),
        (200, torch.inf),
    ],
)
def test_hidden_values_reach_nothing(D, value):
    """Behind the diagonal, behind a mask, in the next sequence."""
    q, k, v = (t.bfloat16() for t in qkv(B=1, H=1, S=150, T=150, D=D).values())
    late = (slice(None), slice(None), slice(100, None))
    run = functools.partial(fasttx.attention, backend="cuda", return_lse=True)
    lengths = {"cu_seqlens": torch.tensor([0, 100, 150])}
    mask = (torch.arange(150) < 100)[None, None, None]
    dirty = [poisoned(t, late, value) for t in (q, k, v)]
    for options, shown in (
        (CAUSAL, 100),
        (lengths, 100),
        ({"attn_mask": mask}, 150),
        ({"attn_mask": mask, **DROP}, 150),
    ):
        query = q if shown == 150 else dirty[0]
        with card(90):
            pairs = zip(run(query, *dirty[1:], **options), run(q, k, v, **options), strict=True)
        for got, clean in pairs:
            got, clean = got[:, :, :shown].float(), clean[:, :, :shown].float()
            torch.testing.assert_close(got, clean, atol=1e-2, rtol=1e-2)


def test_visible_nan_shows():
    q, k, v = (t.bfloat16() for t in qkv(S=70, T=70).values())
    for which in range(3):
        tensors = [q, k, v]
        tensors[which] = poisoned(tensors[which], (1, 1, 4, 2), torch.nan)
        out = fasttx.attention(*tensors, is_causal=True, backend="cuda")
        wrong = out.isnan()
        assert not wrong[0].any() and not wrong[1, 0].any() and not wrong[1, 1, :4].any()
        assert wrong[1, 1, 4, 2] and wrong[1, 1].any(-1).sum() == (1 if which == 0 else 66)


def test_shared_memory_of_heads_and_rows():
    """Heads and batches that share their memory are TMA's; rows that do are the kernels' of sm_80."""
    q, k, v = (t.bfloat16() for t in qkv(B=2, H=2, S=70, D=64).values())
    run = functools.partial(fasttx.attention, is_causal=True, backend="cuda")
    shared = [t[:1, :1].expand_as(t) for t in (k, v)]
    assert torch.equal(run(q, *shared), run(q, *(t.contiguous() for t in shared)))
    one = k[:, :, :1].expand_as(k)
    torch.testing.assert_close(run(q, one, v), run(q, one.contiguous(), v), atol=1e-2, rtol=1e-2)


def test_a_refused_launch_is_an_error():
    q, k, v = (t.bfloat16() for t in qkv().values())
    library().emulator_refuse(1)
    with pytest.raises(RuntimeError, match=r"fasttx attention_fwd \(CUDA\) on \[.*\]: refused"):
        fasttx.attention(q, k, v, backend="cuda")
    fasttx.attention(q, k, v, backend="cuda")


FILE = "cuda/sm90/attention_fwd.h"
# The case that shows a bug, and the bug.
PLANTED = [
    ("64", Bug("no wait for K", FILE, "wait(L::K_FULL, blocks + 1);", "")),
    ("64", Bug("no wait for V", FILE, "start_scores(me, s, blocks + 1);\n        wait(L::V_FULL, blocks);", "start_scores(me, s, blocks + 1);")),
    ("64", Bug("S before its product is done", FILE, "wgmma_wait<0>();\n      release(L::K_EMPTY, blocks);", "release(L::K_EMPTY, blocks);")),
    ("64", Bug("P changed under the product that reads it", FILE, "wgmma_wait<0>();\n        release(L::V_EMPTY, blocks++);\n        rescale(o, rows);", "release(L::V_EMPTY, blocks++);\n        rescale(o, rows);")),
    ("64", Bug("no wait for an empty stage", FILE, "mbarrier_wait(base + empty + 8 * stage, Stages::phase(n) ^ 1);", "")),
    ("64", Bug("no wait for Q's room", FILE, "mbarrier_wait(base + L::Q_EMPTY, Ring<1>::phase(tiles) ^ 1);", "")),
    ("64", Bug("wrong byte count", FILE, "L::STAGE + more", "L::STAGE + more - 16")),
    ("64", Bug("a turn never given back", FILE, "if (L::TURNS) barrier_arrive(L::TURN + Me().next(), 256);", "")),
    ("64", Bug("no barrier before out is read", FILE, "fence_async();\n    meet(me);", "fence_async();")),
    ("64", Bug("out overwritten before it is read", FILE, "if (me.thread == 0) tma_wait_read<0>();", "")),
    ("few keys", Bug("one key too many", FILE, "min(at.T - 1, i + at.high)", "min(at.T, i + at.high)")),
    ("128", Bug("V as if it were K", FILE, "along_rows<KEYS>(v, r, 0)", "along_columns<KEYS>(v, r, 0)")),
    ("64", Bug("wrong swizzle of out", "cuda/sm90/heads.h", "(row & 7)", "(row & 3)")),
    ("64", Bug("wrong swizzle of the operands", "cuda/matrix_descriptor.h", "(4 - static_cast<int>(swizzle)) & 3", "(3 - static_cast<int>(swizzle)) & 3")),
    ("float mask", Bug("another row's mask", "cuda/sm90/attention_bias.h", "row + x / 2 % 2 * 8", "row")),
]  # fmt: skip
BUGS = [bug for _, bug in PLANTED]


@functools.cache
def planted() -> Planted:
    return planted_kernels("attention_fwd_sm90", BUGS)


def caught(name: str, bug: str | None) -> bool:
    """Whether some schedule shows it: a fault, or a result that is not right."""
    case = by_name(LONG, name)
    for eager, seed in MODES:
        with planted().bug(bug, 90, eager, seed):
            try:
                held(case, torch.bfloat16, gradients=False)
            except (RuntimeError, AssertionError):
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bug"), [(n, b.name) for n, b in PLANTED], ids=lambda x: x)
def test_a_planted_bug_is_caught(name, bug):
    assert caught(name, bug)


@pytest.mark.slow
def test_without_a_bug_nothing_is_caught():
    assert not caught("64", None)
