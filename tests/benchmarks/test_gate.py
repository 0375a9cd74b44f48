"""The gate: a wrong answer gets no ratio, however fast it is."""

from types import SimpleNamespace

import pytest
import torch
from fasttx.benchmarks import gate, providers
from fasttx.benchmarks.ops import attention
from fasttx.benchmarks.ops.attention_case import Case, relative_buckets, tensors
from fasttx.benchmarks.rows import Run

CPU = torch.device("cpu")
PROVIDERS = providers.find()
TINY = Case("encoder", 2, 2, 24, 24, 8, "fp32", padding=0.25)


def _wrong(change):
    """A provider that answers as SDPA does, but for ``change(out)``."""

    def made(case, x, check):
        call, leaves = PROVIDERS["sdpa"].attention(case, x, check)
        return (lambda: change(call())), leaves

    return SimpleNamespace(
        NAME="wrong", LABEL="wrong", COMPILES=False, reason=lambda: None, attention=made
    )


def _measure(case, direction, chosen):
    problem = attention.Problem(case, CPU)
    run = Run("test", "now", {})
    rows = attention.measure(problem, direction, chosen, 1, 0.0, run)
    return {row.provider: row for row in rows}, run


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scaled", lambda out: out * 1.01),
        ("one element", lambda out: torch.cat([out[..., :-1], out[..., -1:] + 1e-3], -1)),
        ("nan", lambda out: out + torch.full_like(out, float("nan"))),
        ("zero", lambda out: out * 0),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_provider_gets_no_ratio(name, change, direction):
    chosen = {"sdpa": PROVIDERS["sdpa"], "wrong": _wrong(change)}
    rows, _ = _measure(TINY, direction, chosen)
    assert rows["wrong"].ok is False
    assert "error" in rows["wrong"].why
    assert rows["wrong"].ratio is None
    assert rows["wrong"].median_s is not None
    assert rows["sdpa"].ratio == 1.0


def test_a_gradient_that_is_wrong_shows_in_the_backward_row_only():
    def half_gradient(out):
        return out.detach() + 0.5 * (out - out.detach())

    chosen = {"sdpa": PROVIDERS["sdpa"], "wrong": _wrong(half_gradient)}
    forward, _ = _measure(TINY, "forward", chosen)
    backward, _ = _measure(TINY, "backward", chosen)
    assert forward["wrong"].ok is True
    assert forward["wrong"].ratio is not None
    assert backward["wrong"].ok is False
    assert backward["wrong"].ratio is None


def test_no_ratio_for_anyone_beside_a_wrong_base():
    wrong = _wrong(lambda out: out * 2)
    chosen = {
        "sdpa": SimpleNamespace(**{**vars(wrong), "NAME": "sdpa"}),
        "eager": PROVIDERS["eager"],
    }
    rows, _ = _measure(TINY, "forward", chosen)
    assert rows["sdpa"].ok is False
    assert rows["eager"].ok is True
    assert rows["eager"].ratio is None


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        Case("decoder", 1, 4, 33, 33, 16, "bf16", causal=True, kv_heads=2),
        Case("seq2seq", 2, 2, 20, 20, 8, "fp32", bias="relative"),
        Case("decoder", 1, 2, 20, 20, 8, "fp32", causal=True, bias="alibi"),
        Case("cross", 2, 2, 9, 30, 8, "bf16", padding=0.25),
        Case("encoder", 1, 2, 24, 24, 8, "fp32", dropout=0.1),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("name", ["fasttx", "sdpa", "eager"])
def test_right_providers_pass(case, name):
    problem = attention.Problem(case, CPU)
    verdict = problem.verdict(PROVIDERS[name], "backward")
    if name == "sdpa" and case.dropout:
        assert verdict.ok is None
        assert "bits" in verdict.why
    else:
        assert verdict.ok, verdict.why


def test_a_sampled_check_agrees_with_the_whole_one(monkeypatch):
    case = Case("encoder", 3, 4, 16, 16, 8, "fp32", kv_heads=2)
    x = tensors(case)
    whole = attention.answer(case, x)
    monkeypatch.setattr("fasttx.benchmarks.ops.attention_check.MAX_PAIRS", 16 * 16 * 2 * 2)
    part = attention.answer(case, x)
    assert not whole.sampled
    assert part.sampled
    assert part.groups == [(0, 0), (2, 1)]
    for name in ("out", "dq", "dk", "dv"):
        expected = whole.values[name][[whole.groups.index(group) for group in part.groups]]
        torch.testing.assert_close(part.values[name], expected)


def test_relative_buckets_are_those_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    expected = t5.T5Attention._relative_position_bucket(distance, True, 32, 128)
    assert torch.equal(relative_buckets(300, 300), expected)


def test_visible_pairs_count_what_the_mask_shows():
    for causal in (False, True):
        case = Case("encoder", 3, 2, 10, 10, 4, "fp32", causal=causal, padding=0.25)
        x = tensors(case)
        visible = x.mask.expand(3, 1, 10, 10)
        if causal:
            visible = visible & torch.ones(10, 10, dtype=torch.bool).tril()
        assert case.visible_pairs() == 2 * int(visible.sum())


def test_error_of_non_finite_answers_is_infinite():
    expected = torch.ones(3, dtype=torch.float64)
    error = gate.Error.between(torch.tensor([1.0, float("nan"), 1.0]), expected)
    assert error.rms == error.largest == float("inf")
    verdict = gate.judge({"out": error}, {"out": gate.Error(1.0, 1.0, 1.0)}, torch.float32)
    assert verdict.ok is False
