"""Ops other than attention describe their cases as Work; the harness does the rest."""

from types import SimpleNamespace

import pytest
import torch
from fasttx.benchmarks.limits import Limits
from fasttx.benchmarks.ops import generic
from fasttx.benchmarks.rows import Run

PROVIDERS = {"fasttx": SimpleNamespace(reason=lambda: None)}


def _work(fasttx, **changes):
    def make(device, generator):
        return {
            "x": torch.randn(6, 5, generator=generator, device=device).bfloat16(),
            "rows": torch.arange(6, device=device),
        }

    def truth(x):
        shifted = x["x"] + x["rows"][:, None]
        return shifted.softmax(-1), shifted.logsumexp(-1)

    facts = {
        "op": "pair", "case": "6x5", "dtype": "bf16", "make": make, "truth": truth,
        "leaves": ("x",), "contenders": {"eager": truth, "fasttx": fasttx}, "directions": ("step",),
        "flops": {"step": 1000}, "moved": {"step": 10**9}, "shape": {"rows": 6},
    }  # fmt: skip
    return generic.Work(**{**facts, **changes})


def _right(x):
    shifted = x["x"] + x["rows"][:, None]
    lse = shifted.float().logsumexp(-1)
    return (shifted - lse[:, None]).exp().to(x["x"].dtype), lse.to(x["x"].dtype)


def _measure(work, direction):
    run = Run("test", "now", {}, [Limits("cpu", 1, {"bf16": 1e12}, {}, 1e11, 1e11)])
    problem = generic.Problem(work, torch.device("cpu"))
    return {r.provider: r for r in generic.measure(problem, direction, PROVIDERS, 1, 0.0, run)}, run


@pytest.mark.parametrize("direction", ["forward", "backward", "step"])
def test_two_outputs_and_their_gradient_are_checked(direction):
    rows, _ = _measure(_work(_right), direction)
    assert rows["fasttx"].ok, rows["fasttx"].why
    assert rows["fasttx"].ratio is not None
    names = {"out", "out1"} | ({"dx"} if direction != "forward" else set())
    assert set(rows["fasttx"].errors) == names


@pytest.mark.parametrize("part", [0, 1])
def test_a_wrong_output_gets_no_ratio(part):
    def wrong(x):
        outputs = list(_right(x))
        outputs[part] = outputs[part] * 1.5
        return tuple(outputs)

    rows, _ = _measure(_work(wrong), "forward")
    assert rows["fasttx"].ok is False
    assert rows["fasttx"].ratio is None


def test_share_is_of_the_nearer_limit():
    rows, _ = _measure(_work(_right), "step")
    assert rows["fasttx"].share_of == "memory bandwidth, 1 thr."
    assert rows["fasttx"].bandwidth == pytest.approx(10**9 / rows["fasttx"].median_s)


def test_what_cannot_be_checked_has_no_ratio_and_what_is_unsupported_is_left_out():
    rows, _ = _measure(_work(_right, checks={"fasttx": None}), "forward")
    assert rows["fasttx"].ok is None
    assert rows["fasttx"].ratio is None

    def refuse(x):
        raise NotImplementedError("pair: cpu: needs fp32")

    rows, run = _measure(_work(refuse), "forward")
    assert "fasttx" not in rows
    assert run.skipped[0]["why"] == "pair: cpu: needs fp32"


def test_a_case_is_compiled_once_and_what_was_compiled_before_forgotten(monkeypatch):
    """Else the cases after the eighth of one function would run uncompiled."""
    told = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: told.append("made") or function)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: told.append("reset"))
    work = _work(_right)
    problem, run = generic.Problem(work, torch.device("cpu")), Run("test", "now", {})
    providers = PROVIDERS | {"torch_compile": SimpleNamespace(LABEL="compiled", COMPILES=True)}
    for direction in ("forward", "step"):
        rows = generic.measure(problem, direction, providers, 1, 0.0, run, everything=True)
        assert "torch_compile" in {row.provider for row in rows}
    assert told == ["reset", "made"]
