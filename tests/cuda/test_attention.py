"""attention's kernels for sm_80 in the emulator: the cases of tests/ops and long ones against fp64,
forward and backward, in every schedule; what is hidden; planted bugs."""
# ruff: noqa: E501 (tables, one case a line)

import functools

import pytest
import torch

import fasttx
from fasttx.ops.attention import attention_bwd, attention_fwd
from tests.emulator import instructions
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
from .emulated import card, mode, traffic
from .planted import Bug, Planted

# Several tiles of rows and of keys, of each kernel.
LONG = [
    Case("64", qkv(B=1, S=200, T=170, D=64)),
    Case("64, causal", qkv(B=1, S=300, D=64), CAUSAL),
    Case("64, lower right, grouped", qkv(B=1, H=4, G=2, S=150, T=260, D=64), LOWER),
    Case("64, window", qkv(B=1, S=300, D=64), {"window": (40, 9)}),
    Case("64, packed", qkv(B=1, S=260, D=64), {"cu_seqlens": torch.tensor([0, 1, 130, 130, 259]), **CAUSAL}),
    Case("64, relative", {**qkv(B=1, S=260, D=64), "table": random(32, 2)}, {}, WITH_TABLE, relative()),
    Case("64, table of far buckets", {**qkv(B=2, S=40, T=290, D=48), "table": random(10, 2)}, DROP, WITH_TABLE, relative(max_distance=6)),
    Case("64, wide reach", {**qkv(B=1, S=150, D=64), "table": random(16, 2)}, CAUSAL, WITH_TABLE, relative(max_distance=3000)),
    Case("64, dropout", qkv(B=1, S=150, T=200, D=64), DROP),
    Case("64, padding", {**qkv(B=3, S=140, D=64), "attn_mask": padding(3, 140)}),
    Case("64, mask for all heads", {**qkv(B=2, S=140, T=70, D=64), "attn_mask": additive(1, 1, 140, 70)}, {"softcap": 3.0}, WITH_MASK),
    Case("128", qkv(B=1, S=140, T=200, D=128)),
    Case("128, causal", qkv(B=1, S=200, D=128), CAUSAL),
    Case("128, ALiBi, grouped", {**qkv(B=1, H=4, G=2, S=140, D=128), "slopes": fasttx.ALiBi.standard_slopes(4)}, CAUSAL, bias=alibi, keep=("slopes",)),
    Case("128, mask a row, dropout", {**qkv(B=2, S=70, D=128), "attn_mask": random(2, 1, 70, 1)}, DROP, WITH_MASK),
    Case("128, everything", {**qkv(B=1, H=4, G=2, S=130, T=150, D=120, Dv=72), "table": random(16, 4), "attn_mask": additive(1, 1, 130, 150)}, {**LOWER, **DROP, "window": (70, None), "softcap": 6.0}, (*WITH_MASK, "table"), relative(max_distance=30)),
    Case("256", qkv(B=1, H=1, S=90, T=130, D=256)),
    Case("256, relative, dropout", {**qkv(B=1, H=2, G=1, S=70, T=100, D=200, Dv=160), "table": random(16, 2)}, {**LOWER, **DROP}, WITH_TABLE, relative(max_distance=30)),
]  # fmt: skip
QUICK = {"one query", "no keys", "no queries", "causal", "lower right, S > T", "window and softcap, grouped"}  # fmt: skip
QUICK |= {"bool mask with empty rows", "float mask [B,1,1,T]", "packed cross, dropout", "every layout"}  # fmt: skip
QUICK |= {"wide value, odd head", "rows of finite minima", "everything", "negative scale"}
QUICK_LONG = {"64, causal", "64, packed", "64, table of far buckets", "64, mask for all heads"}
QUICK_LONG |= {"128, everything", "256, relative, dropout"}


@pytest.mark.parametrize(("dtype", "case", "schedule"), list(selected(LONG, QUICK, QUICK_LONG)))
def test_against_fp64(dtype, case, schedule):
    with card(80), mode(*schedule):
        held(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("D", [*range(1, 33), 63, 65, 72, 127, 129, 136, 200, 255])
def test_every_head_size(D):
    case = Case("", qkv(B=1, S=21, T=35, D=D, Dv=D // 2 + 1), CAUSAL)
    with card(80):
        held(case, HALF[D % 2])


def leaves(case: Case) -> dict[str, torch.Tensor]:
    inputs = {
        n: t.bfloat16() if t.is_floating_point() and n not in case.keep else t
        for n, t in case.inputs.items()
    }
    return {n: t.requires_grad_() if n in case.wanted else t for n, t in inputs.items()}


@pytest.mark.parametrize("name", ["64, causal", "128, everything"])
def test_schedules_give_the_same_bits(name):
    case = by_name(LONG, name)
    results = []
    for schedule in MODES[::2]:
        inputs = leaves(case)
        with card(80), mode(*schedule):
            out, lse = case.function("cuda")(**inputs)
            wanted = [inputs[n] for n in case.wanted]
            grads = torch.autograd.grad(out.float().square().sum() + lse[lse > -9].sum(), wanted)
        results.append([out, lse, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("D", [24, 100, 256])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_values_reach_nothing(D, value):
    """Behind the diagonal, a mask, dropout, in the next sequence: out, and every gradient."""
    tensors = [t.bfloat16() for t in qkv(B=1, S=60, D=D).values()]
    mask = (torch.arange(60) < 40)[None, None, None]
    dirty = [t.clone() for t in tensors]
    for t in dirty:
        t[:, :, 40:] = value
    for options, rows_too in (
        (CAUSAL, True),
        ({"cu_seqlens": torch.tensor([0, 40, 60])}, True),
        ({"attn_mask": mask, **DROP}, False),
    ):
        results = []
        for q, k, v in (tensors, dirty if rows_too else [tensors[0], *dirty[1:]]):
            given = [t.clone().requires_grad_() for t in (q, k, v)]
            shown = 40 if rows_too else 60
            weight = torch.zeros_like(given[0])
            weight[:, :, :shown] = 1
            with card(80):
                out = fasttx.attention(*given, **options, backend="cuda")
                weight = weight * out.detach().nan_to_num(0, 0, 0)
                grads = torch.autograd.grad(out, given, weight)
            seen = [out[:, :, :shown], grads[0][:, :, :shown], *(g[:, :, :40] for g in grads[1:])]
            results.append([t.detach().float() for t in seen])
        clean, got = results
        # Keys are met by the later, poisoned rows alone under the diagonal.
        for i in (0, 1) if options is CAUSAL else range(4):
            torch.testing.assert_close(got[i], clean[i], atol=3e-2, rtol=3e-2)


def test_hidden_gradients_reach_nothing():
    """NaN in the gradient of rows that a key is hidden from."""
    q, k, v = (t.bfloat16() for t in qkv(B=1, H=2, G=1, S=70).values())
    dout = torch.randn(1, 2, 70, 16).bfloat16()
    late = dout.clone()
    late[:, :, :30] = torch.nan
    rest = (None,) * 8
    scalars = (0.25, 0.0, 0.0, -1, 0, False, 0)
    with card(80):
        out, lse = attention_fwd(q, k, v, *rest, *scalars, backend="cuda")
        clean, got = (
            attention_bwd(g, None, q, k, v, out, lse, *rest, *scalars, 7, backend="cuda")
            for g in (dout, late)
        )
    assert got[0][:, :, :30].isnan().all() and got[1][:, :, :29].isnan().any(-1).all()
    for i in range(3):
        torch.testing.assert_close(got[i][:, :, 30:], clean[i][:, :, 30:], atol=3e-2, rtol=3e-2)


def test_visible_nan_shows():
    q, k, v = (t.bfloat16() for t in qkv(S=70).values())
    for which in range(3):
        tensors = [t.clone() for t in (q, k, v)]
        tensors[which][1, 1, 4, 2] = torch.nan
        with card(80):
            out = fasttx.attention(*tensors, is_causal=True, backend="cuda")
        wrong = out.isnan()
        assert not wrong[0].any() and not wrong[1, 0].any() and not wrong[1, 1, :4].any()
        assert wrong[1, 1, 4, 2] and wrong[1, 1].any(-1).sum() == (1 if which == 0 else 66)


@pytest.mark.parametrize("need", [1, 2, 4, 8, 16, 31])
def test_subsets_of_gradients(need):
    """What is not asked for has no element; what is, the same bits."""
    q, k, v = (t.bfloat16() for t in qkv(B=1, S=40, T=50).values())
    mask = random(1, 2, 1, 50).bfloat16()
    with card(80), fasttx.testing.recorded_calls() as calls:
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        weight = random(8, 2).bfloat16().requires_grad_()
        bias = fasttx.RelativePositionBias(weight, max_distance=9)
        out = fasttx.attention(*given, mask.requires_grad_(), position_bias=bias, backend="cuda")
        out.sum().backward()
        ((*args, all_bits),) = (args for op, args, _ in calls if op is attention_bwd)
        assert all_bits == 31
        with torch.no_grad():
            whole = attention_bwd(*args, 31, backend="cuda")
            some = attention_bwd(*args, need, backend="cuda")
    for bit, (got, want) in enumerate(zip(some, whole, strict=True)):
        assert torch.equal(got, want) if need >> bit & 1 else got.numel() == 0


def test_follows_the_other_backends():
    """out and lse are the reference's, and its backward follows."""
    q, k, v = (t.bfloat16() for t in qkv(S=30, T=44).values())
    dout = torch.randn(2, 2, 30, 16).bfloat16()
    rest = (*(None,) * 7, torch.tensor([9]))
    scalars = (0.25, 0.0, 0.2, -1, 0, True, 0)
    with card(80):
        backends = ("cuda", "reference")
        results = [attention_fwd(q, k, v, *rest, *scalars, backend=b) for b in backends]
        torch.testing.assert_close(*results, atol=1e-2, rtol=1e-2)
        grads = [
            attention_bwd(dout, None, q, k, v, *residuals, *rest, *scalars, 7, backend=b)[:3]
            for residuals in results
            for b in backends
        ]
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], atol=2e-2, rtol=2e-2)


def test_tiles_meet_all_banks():
    """ldmatrix never waits for a bank, at any width."""
    for D in (64, 128, 256):
        q, k, v = (t.bfloat16().requires_grad_() for t in qkv(B=1, H=1, S=40, D=D).values())
        with card(80):
            traffic()
            fasttx.attention(q, k, v, backend="cuda").sum().backward()
            assert traffic().shared_conflicts == 0


FWD, BWD, TILE = (f"cuda/sm80/attention_{n}.h" for n in ("fwd", "bwd", "tile"))
FETCH_V = "fetch<BN, D, F::THREADS>(base + F::V, v, a.v.strides[2], j0, at.T, p.Dv, opaque(thread));"  # fmt: skip
K_THERE = "__syncthreads();  // K is there; V and the bias of the last tile are no longer read\n    "  # fmt: skip
V_THERE = "__syncthreads();  // V and the bias are there, K is no longer read\n    "
NEXT_K = "if (j0 + BN < keys.end) fetch_k(j0 + BN);"
THERE = "__syncthreads();  // tile n is there, and with two stages tile n - 1 no longer read\n    "
NEXT = "if (F::STAGES == 2 && n + 1 < steps) fetch_other(n + 1);"
WAIT = "cp_async_wait<0>();\n    "
# The case that shows a bug, and the bug.
PLANTED = [
    ("64", Bug("no wait for K", FWD, WAIT + K_THERE + FETCH_V, K_THERE + FETCH_V)),
    ("64", Bug("no barrier for K", FWD, WAIT + K_THERE + FETCH_V, WAIT + FETCH_V)),
    ("64", Bug("no wait for V", FWD, WAIT + V_THERE + NEXT_K, V_THERE + NEXT_K)),
    ("64", Bug("no barrier for V", FWD, WAIT + V_THERE + NEXT_K, WAIT + NEXT_K)),
    ("64", Bug("one key too many", FWD, "min(i + at.high, at.T - 1)", "min(i + at.high, at.T)")),
    ("64", Bug("wrong swizzle", TILE, "to += swizzled<COLUMNS>(row, column);", "to += row * COLUMNS * 2 + column * 2;")),
    ("64", Bug("no wait in the backward", BWD, WAIT + THERE + NEXT, THERE + NEXT)),
    ("64", Bug("no barrier in the backward", BWD, WAIT + THERE + NEXT, WAIT + NEXT)),
    ("64, table of far buckets", Bug("a pair left out of its distance", BWD, "max(0, x - (F::OWN - 1))", "max(1, x - (F::OWN - 1))")),
    ("64, dropout", Bug("another row's bits", "cuda/tile/keep.h", "i + x * 16 + lane % 16", "i + x * 16 + lane % 8")),
    ("64, causal", Bug("an edge taken for whole", BWD, "j0 < i0 + OTHER - 1 + at.low || j0 + OWN - 1 > i0 + at.high", "j0 < i0 + OTHER - 1 + at.low || j0 > i0 + at.high")),
]  # fmt: skip
BUGS = [bug for _, bug in PLANTED]


@functools.cache
def planted() -> Planted:
    return planted_kernels("attention_sm80", BUGS)


@functools.cache
def narrow_of_a_clean_run(name: str) -> int:
    return run_planted(name, None, False, 0)


def run_planted(name: str, bug: str | None, eager: bool, seed: int) -> int:
    """Bytes moved by less than 16: many more where rows that met NaN are made once more, which
    mends what unwritten shared memory, NaN, has done."""
    case = by_name(LONG, name)
    with planted().bug(bug, 80, eager, seed):
        instructions.traffic(planted().library)
        held(case, torch.float16)
        return instructions.traffic(planted().library).narrow


def caught(name: str, bug: str | None) -> bool:
    """Whether some schedule shows it: a fault, a result that is not right, or rows made again."""
    expected = narrow_of_a_clean_run(name)
    for eager, seed in MODES[::2] + MODES[1::2]:
        try:
            if run_planted(name, bug, eager, seed) != expected:
                return True
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
