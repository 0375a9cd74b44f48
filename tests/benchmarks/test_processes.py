"""Contenders in processes of their own, and what fresh processes tell."""

import sys

import pytest
import torch
from fasttx.benchmarks import apart, contest, fresh, options
from fasttx.benchmarks.gate import Verdict
from fasttx.benchmarks.ops.attention_case import Case
from fasttx.benchmarks.rows import Run
from fasttx.benchmarks.session import Session
from rich.console import Console

CPU = torch.device("cpu")
SERVED = """
import json, sys, types
from fasttx.benchmarks import apart

def busy(threads, loops):
    if loops < 0:
        raise ValueError("loops must not be negative")
    return {"call": lambda: sum(range(loops)), "double": lambda: 2 * loops}

sys.modules["fasttx.benchmarks.served"] = types.SimpleNamespace(busy=busy)
apart._serve(json.loads(sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path):
    path = tmp_path / "served.py"
    path.write_text(SERVED)
    made = []

    def begin(loops):
        command = (sys.executable, str(path))
        made.append(apart.Apart("served:busy", {"loops": loops}, 1, command))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def test_a_call_apart_takes_turns_and_times_itself(start):
    call = start(200_000)
    assert call() == sum(range(200_000)) and call("double") == 400_000
    assert call.prepared_s > 0
    contenders = {
        "sdpa": contest.Contender("here", lambda: sum(range(1000)), Verdict(True)),
        "apart": contest.Contender("apart", call, Verdict(True), call.prepared_s, [apart.NOTE]),
    }
    group = contest.Group("op", "x", "x", "forward", "fp32", "sdpa", tokens=7)
    rows = contest.compare(group, contenders, CPU, 1, 0.0, Run("test", "now", {}))
    here, there = rows
    assert there.median_s > 20 * here.median_s and there.ratio < 0.05
    assert there.compile_s >= call.prepared_s and here.compile_s is None
    assert here.warmup_s >= here.first_call_s > 0
    assert here.tokens_per_s == 7 / here.median_s
    assert there.notes[0].startswith("in a process of its own")


def test_a_child_that_fails_says_why(start):
    with pytest.raises(RuntimeError, match="loops must not be negative"):
        start(-1)


@pytest.mark.slow
def test_memory_of_an_op_grows_with_what_it_keeps():
    case = Case("encoder", 1, 2, 512, 512, 64, "fp32")
    eager, ours = (
        fresh.attention(case, "forward", "memory", name, 1, "cpu") for name in ("eager", "fasttx")
    )
    probabilities = 2 * 512 * 512 * 4
    assert eager >= probabilities > ours > 0


def test_a_process_that_fails_gives_nothing():
    arguments = {"provider": "fasttx"}
    assert fresh.measure("no_such_module:make", arguments, "cold", 1, "cpu") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"ops": ("softmax",), "models": ()},
        {"ops": (), "models": (), "layers": ("t5-decoder",), "sizes": (16,)},
        {"ops": (), "models": (), "training": ("toy-t5",)},
    ],
)
def test_cold_start_and_memory_of_every_kind(given):
    asked = options.Options(
        **given, dtypes=("fp32",), budget_s=0.01, cold=True, memory=True, device="cpu"
    )
    session = Session(asked, Console(quiet=True))
    rows = session.execute().rows
    assert rows
    for row in rows:
        assert row.cold_s > row.median_s and row.peak_bytes is not None, row
