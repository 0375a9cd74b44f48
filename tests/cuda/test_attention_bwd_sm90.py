"""attention's backward for sm_90a in the emulator: the cases of tests/ops and long ones against
fp64, in every schedule; dq in order; what is hidden; planted bugs."""
# ruff: noqa: E501 (a table, one case a line)

import functools

import pytest
import torch

import fasttx
from fasttx.ops.attention import ORDERED, attention_bwd, attention_fwd
from fasttx.testing import recorded_calls
from tests.ops.attention_cases import (
    WITH_MASK,
    WITH_TABLE,
    Case,
    additive,
    padding,
    qkv,
    random,
    relative,
)

from .attention import CAUSAL, DROP, LOWER, alibi, by_name, held, planted_kernels, selected
from .cases import HALF, MODES
from .compiled import CUDA, compiled, nvcc
from .emulated import card, mode, traffic
from .planted import Bug, Planted

# Several tiles of 128 keys and of rows, 128 (64 columns) or 64 (128 columns).
LONG = [
    Case("64", qkv(B=1, S=300, T=290, D=64)),
    Case("64, causal", qkv(B=1, S=400, D=64), CAUSAL),
    Case("64, causal, S > T", qkv(B=1, H=1, S=420, T=140, D=64), CAUSAL),
    Case("64, lower right, grouped", qkv(B=1, H=4, G=2, S=150, T=330, D=64), LOWER),
    Case("64, window", qkv(B=1, H=1, S=500, D=64), {"window": (40, 9)}),
    Case("64, packed", qkv(B=1, S=300, D=64), {"cu_seqlens": torch.tensor([0, 1, 130, 130, 259]), **CAUSAL}),
    Case("64, packed apart", qkv(B=1, H=4, G=1, S=150, T=300, D=48), {"cu_seqlens": (torch.tensor([0, 140, 140, 150]), torch.tensor([0, 10, 150, 300])), **DROP}),
    Case("64, relative", {**qkv(B=1, S=400, D=64), "table": random(32, 2)}, {}, WITH_TABLE, relative()),
    Case("64, table of far buckets", {**qkv(B=2, H=4, G=2, S=150, T=290, D=48), "table": random(10, 4)}, DROP, WITH_TABLE, relative(max_distance=6)),
    Case("64, wide reach", {**qkv(B=1, S=200, D=64), "table": random(80, 2)}, CAUSAL, WITH_TABLE, relative(max_distance=3000)),
    Case("64, 300 buckets", {**qkv(B=1, H=1, S=140, D=64), "table": random(300, 1)}, {}, WITH_TABLE, relative(max_distance=400)),
    Case("64, dropout", qkv(B=1, S=150, T=300, D=64), DROP),
    Case("64, softcap", qkv(B=1, S=150, T=300, D=64), {"softcap": 3.0, **LOWER}),
    Case("64, padding", {**qkv(B=3, S=140, D=64), "attn_mask": padding(3, 140)}),
    Case("64, mask a key", {**qkv(B=2, S=150, T=280, D=64), "attn_mask": additive(1, 2, 1, 280)}, {}, WITH_MASK),
    Case("64, mask for all heads", {**qkv(B=2, S=140, T=150, D=64), "attn_mask": additive(1, 1, 140, 150)}, {"softcap": 3.0}, WITH_MASK),
    Case("128", qkv(B=1, S=200, T=270, D=128)),
    Case("128, causal", qkv(B=1, S=300, D=128), CAUSAL),
    Case("128, causal, grouped", qkv(B=1, H=4, G=2, S=150, D=128), CAUSAL),
    Case("128, ALiBi", {**qkv(B=1, S=200, D=128), "slopes": fasttx.ALiBi.standard_slopes(2)}, CAUSAL, bias=alibi, keep=("slopes",)),
    Case("128, relative", {**qkv(B=1, S=200, T=290, D=128), "table": random(32, 2)}, LOWER, WITH_TABLE, relative(bidirectional=False)),
    Case("128, packed", qkv(B=1, S=300, D=128), {"cu_seqlens": torch.tensor([0, 129, 130, 290])}),
    Case("128, mask a row, dropout", {**qkv(B=2, S=70, T=140, D=128), "attn_mask": random(2, 1, 70, 1)}, DROP, WITH_MASK),
    Case("128, everything", {**qkv(B=1, H=4, G=2, S=130, T=150, D=120, Dv=72), "table": random(16, 4), "attn_mask": additive(1, 1, 130, 150)}, {**LOWER, **DROP, "window": (70, None), "softcap": 6.0}, (*WITH_MASK, "table"), relative(max_distance=30)),
]  # fmt: skip
QUICK = {"one key", "lower right, S > T", "window and softcap, grouped", "float mask [B,1,1,T]"}
QUICK |= {
    "wide value, odd head",
    "rows of finite minima",
    "everything",
    "negative scale",
    "no keys",
}
QUICK_LONG = {
    "64, causal",
    "64, packed apart",
    "64, table of far buckets",
    "64, softcap",
    "64, mask a key",
}
QUICK_LONG |= {"64, wide reach", "128", "128, causal, grouped", "128, relative", "128, everything"}


@pytest.mark.parametrize(("dtype", "case", "schedule"), list(selected(LONG, QUICK, QUICK_LONG)))
def test_against_fp64(dtype, case, schedule):
    with card(90), mode(*schedule):
        held(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("D", [*range(1, 33), 63, 65, 72, 127, 128])
def test_every_head_size(D):
    with card(90):
        held(Case("", qkv(B=1, S=21, T=35, D=D, Dv=D // 2 + 1), CAUSAL), HALF[D % 2])


def call(options=None, D=64, S=300, T=300, H=2, G=1, **more):
    """The arguments of attention_bwd but need, from its own forward."""
    q, k, v = (t.bfloat16() for t in qkv(B=1, H=H, G=G, S=S, T=T, D=D).values())
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with card(90), recorded_calls() as calls:
        fasttx.attention(
            *leaves, **(options or {}), **more, backend="cuda"
        ).square().sum().backward()
    (args,) = (args for op, args, _ in calls if op is attention_bwd)
    return args[:-1]


def gradients(args, need, schedule=(False, 0)):
    with torch.no_grad(), card(90), mode(*schedule):
        return attention_bwd(*args, need, backend="cuda")


@pytest.mark.parametrize(
    ("D", "options"), [(64, CAUSAL), (128, {}), (64, {"window": (30, 200)})], ids=str
)
def test_dq_in_order_is_the_same_bits(D, options):
    """Whatever blocks run first; without the order only dk and dv are."""
    args = call(options, D, 300 if D == 64 else 200, 300)
    ordered = [gradients(args, 7 | ORDERED, m)[:3] for m in MODES[:3]]
    free = [gradients(args, 7, m)[:3] for m in MODES[:2]]
    for other in ordered[1:]:
        assert all(map(torch.equal, other, ordered[0]))
    for other in free:
        torch.testing.assert_close(other[0], ordered[0][0], atol=2e-2, rtol=2e-2)
        assert all(map(torch.equal, other[1:], ordered[0][1:]))


@pytest.mark.parametrize("deterministic", [False, True])
def test_order_is_asked_for(deterministic):
    q, k, v = (t.float().requires_grad_() for t in qkv(S=5).values())
    torch.use_deterministic_algorithms(deterministic)
    try:
        with recorded_calls() as calls:
            fasttx.attention(q, k, v).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    (need,) = (args[-1] for op, args, _ in calls if op is attention_bwd)
    assert need == (7 | ORDERED if deterministic else 7)


def test_schedules_give_the_same_bits():
    """Gradients of a mask and of a table too."""
    case = by_name(LONG, "64, table of far buckets")
    bias = {"position_bias": case.bias(case.inputs["table"].bfloat16().requires_grad_())}
    args = call(
        {**DROP, **bias},
        48,
        150,
        290,
        4,
        2,
        attn_mask=random(1, 4, 1, 290).bfloat16().requires_grad_(),
    )
    first, *others = (gradients(args, 31 | ORDERED, m) for m in MODES[::2])
    for other in others:
        assert all(map(torch.equal, other, first))


@pytest.mark.parametrize("need", [1, 2, 4, 8, 16, 14])
def test_subsets_of_gradients(need):
    bias = fasttx.RelativePositionBias(random(8, 2).bfloat16().requires_grad_(), max_distance=9)
    mask = random(1, 2, 1, 50).bfloat16().requires_grad_()
    args = call({"position_bias": bias}, 32, 40, 50, attn_mask=mask)
    whole, some = gradients(args, 31), gradients(args, need)
    for bit, (got, want) in enumerate(zip(some, whole, strict=True)):
        assert torch.equal(got, want) if need >> bit & 1 else got.numel() == 0


@pytest.mark.parametrize(
    ("D", "value"),
    [
        (64, torch.inf),
        pytest.param(64, torch.nan, marks=pytest.mark.slow),
        pytest.param(128, torch.nan, marks=pytest.mark.slow),
        pytest.param(128, torch.inf, marks=pytest.mark.slow),
    ],
)
def test_hidden_values_reach_nothing(D, value):
    """Behind the diagonal, a mask, dropout, in the next sequence: every gradient."""
    tensors = [t.bfloat16() for t in qkv(B=1, H=2, G=1, S=140, D=D).values()]
    mask = (torch.arange(140) < 132)[None, None, None]
    dirty = [t.clone() for t in tensors]
    for t in dirty:
        t[:, :, 132:] = value
    for options, rows_too in (
        (CAUSAL, True),
        ({"cu_seqlens": torch.tensor([0, 132, 140])}, True),
        ({"attn_mask": mask, **DROP}, False),
        ({"attn_mask": mask, "softcap": 5.0}, False),
    ):
        results = []
        for q, k, v in (tensors, dirty if rows_too else [tensors[0], *dirty[1:]]):
            given = [t.clone().requires_grad_() for t in (q, k, v)]
            shown = 132 if rows_too else 140
            weight = torch.zeros_like(given[0])
            weight[:, :, :shown] = 1
            with card(90):
                out = fasttx.attention(*given, **options, backend="cuda")
                grads = torch.autograd.grad(out, given, weight * out.detach().nan_to_num(0, 0, 0))
            results.append([grads[0][:, :, :shown], *(g[:, :, :132] for g in grads[1:])])
        clean, got = results
        # Keys are met by the later, poisoned rows alone under the diagonal.
        for i in (0,) if options is CAUSAL else range(3):
            torch.testing.assert_close(got[i], clean[i], atol=3e-2, rtol=3e-2)


def test_hidden_gradients_reach_nothing():
    """NaN in the gradient of rows that a key is hidden from."""
    q, k, v = (t.bfloat16() for t in qkv(B=1, H=2, G=1, S=140).values())
    dout = torch.randn(1, 2, 140, 16).bfloat16()
    late = dout.clone()
    late[:, :, :30] = torch.nan
    rest = (None,) * 8
    scalars = (0.25, 0.0, 0.0, -1, 0, False, 0)
    with card(90):
        out, lse = attention_fwd(q, k, v, *rest, *scalars, backend="cuda")
        clean, got = (
            attention_bwd(g, None, q, k, v, out, lse, *rest, *scalars, 7, backend="cuda")
            for g in (dout, late)
        )
    assert got[0][:, :, :30].isnan().all() and got[1][:, :, :29].isnan().any(-1).all()
    # Tiles that met NaN are done again, in fp32.
    for i in range(3):
        torch.testing.assert_close(got[i][:, :, 30:], clean[i][:, :, 30:], atol=3e-2, rtol=3e-2)


def test_follows_the_other_backends():
    q, k, v = (t.bfloat16() for t in qkv(S=30, T=144).values())
    dout = torch.randn(2, 2, 30, 16).bfloat16()
    rest = (*(None,) * 7, torch.tensor([9]))
    scalars = (0.25, 0.0, 0.2, -1, 0, True, 0)
    with card(90):
        residuals = attention_fwd(q, k, v, *rest, *scalars, backend="reference")
        ours, theirs = (
            attention_bwd(dout, None, q, k, v, *residuals, *rest, *scalars, 7, backend=b)[:3]
            for b in ("cuda", "reference")
        )
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def test_tiles_meet_all_banks():
    for D in (64, 128):
        args = call({}, D, 140, 140)
        traffic()
        gradients(args, 7)
        assert traffic().shared_conflicts == 0


MAIN, PAIRS, HEADS = (
    "cuda/sm90/attention_bwd_main.h",
    "cuda/sm90/attention_bwd_pairs.h",
    "cuda/sm90/heads.h",
)
# The case that shows a bug, and the bug.
PLANTED = [
    ("64", Bug("no wait for Q", MAIN, "mbarrier_wait(bars + 8 * (Q_FULL + stage), phase);", "")),
    (
        "64",
        Bug("no wait for dout", MAIN, "mbarrier_wait(bars + 8 * (DOUT_FULL + stage), phase);", ""),
    ),
    (
        "64",
        Bug(
            "no wait for K and V",
            MAIN,
            "mbarrier_wait(start + Shared::BARRIERS + 8 * KV_FULL, 0);",
            "",
        ),
    ),
    (
        "64",
        Bug(
            "no wait for an empty stage",
            MAIN,
            "mbarrier_wait(bars + 8 * (Q_EMPTY + s), empty);",
            "",
        ),
    ),
    (
        "64",
        Bug(
            "statistics overwritten",
            MAIN,
            "release(end + 8 * (ROWS_EMPTY + again.stage));",
            "mbarrier_arrive(end + 8 * (ROWS_EMPTY + again.stage));",
        ),
    ),
    (
        "64",
        Bug(
            "scores before their product is done",
            MAIN,
            "wgmma_wait<1>();\n      wgmma_hold(s);",
            "wgmma_hold(s);",
        ),
    ),
    (
        "64",
        Bug(
            "dp before its product is done",
            MAIN,
            "wgmma_wait<0>();\n      wgmma_hold(dp);",
            "wgmma_hold(dp);",
        ),
    ),
    (
        "64",
        Bug(
            "dq before its product is done",
            MAIN,
            "wgmma_wait<1>();\n      wgmma_hold(dv);",
            "wgmma_hold(dv);",
        ),
    ),
    (
        "64",
        Bug(
            "Q given back under the product",
            MAIN,
            "wgmma_wait<0>();\n      wgmma_hold(dk);",
            "wgmma_hold(dk);",
        ),
    ),
    (
        "128",
        Bug(
            "no barrier for ds",
            MAIN,
            "fence_async();\n      barrier_sync(1, 256);",
            "fence_async();",
        ),
    ),
    (
        "64",
        Bug(
            "dq added before it is there",
            MAIN,
            "mbarrier_wait(bars + 8 * (DQ_FULL + w), phase);",
            "",
        ),
    ),
    ("64", Bug("dq given back before it is read", MAIN, "tma_wait_read<0>();", "")),
    (
        "64",
        Bug(
            "the other warpgroup's rows of ds",
            MAIN,
            "along_rows<KEYS>(again.ds, k, D == 64 ? 64 * own.group : 0)",
            "along_rows<KEYS>(again.ds, k, 0)",
        ),
    ),
    ("64", Bug("wrong swizzle", HEADS, "(row & 7)", "(row & 3)")),
    ("64, causal", Bug("an edge taken for whole", MAIN, "first_row < common.begin", "false")),
    (
        "64, lower right, grouped",
        Bug(
            "one tile of rows too few",
            MAIN,
            "block.begin = rows.begin / ROWS;",
            "block.begin = (rows.begin + ROWS - 1) / ROWS;",
        ),
    ),
    ("64, dropout", Bug("another row's bits", PAIRS, "x.i0 - t2 + 64 * half", "x.i0 + 64 * half")),
    (
        "64, wide reach",
        Bug("a line too few", PAIRS, "line < 8", "line < 7"),
    ),
    (
        "64, softcap",
        Bug(
            "derivatives in one place",
            PAIRS,
            "n / 32 * (BWD_KEYS * 32) + n % 32 * 16",
            "n / 32 * (BWD_KEYS * 32)",
        ),
    ),
]
BUGS = [bug for _, bug in PLANTED]


@functools.cache
def planted() -> Planted:
    return planted_kernels("attention_bwd_sm90", BUGS)


def caught(name: str, bug: str | None) -> bool:
    """Whether some schedule shows it: a fault, or a result that is not right."""
    case = by_name(LONG, name)
    for eager, seed in [(e, s) for s in range(8) for e in (False, True)]:
        with planted().bug(bug, 90, eager, seed):
            try:
                held(case, torch.bfloat16)
            except (RuntimeError, AssertionError):
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("case", "bug"), [(c, b.name) for c, b in PLANTED])
def test_a_planted_bug_is_caught(case, bug):
    assert caught(case, bug)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted({c for c, _ in PLANTED}))
def test_without_a_bug_nothing_is_caught(case):
    assert not caught(case, None)


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="no nvcc (FASTTX_NVCC names one)")
@pytest.mark.parametrize("name", ["64_bf16", "64_f16", "128_bf16", "128_f16"])
def test_is_compiled_for_what_it_is(name):
    """Nothing spills in either kernel, and products are under way together (compiled refuses else).
    S^T and dP^T are of 64 keys by a tile of rows, dQ by reduce-add."""
    resources, ptx = compiled(CUDA / f"sm90/attention_bwd_{name}.cu")
    assert len(resources) == 2
    assert not [r for r in resources if r.stack or r.stores or r.loads]
    rows = 128 if name.startswith("64") else 64
    product = f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{name.split('_')[1]}"
    copies = ["cp.async.bulk.tensor.4d.shared", "cp.reduce.async.bulk.global.shared::cta"]
    for text in (product, *copies, "setmaxnreg.inc", "stmatrix.sync", "st.release.gpu"):
        assert text in ptx["90a"]
