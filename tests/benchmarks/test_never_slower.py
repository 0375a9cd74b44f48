"""The grid and its verdicts. The clock is a fake one: no time is measured here."""

import json
from types import SimpleNamespace

import pytest
import torch
from fasttx.benchmarks import grid, never_slower, ops
from fasttx.benchmarks.run import main


class Clock:
    """Each call says itself how long it takes."""

    name = "fake"

    def measure(self, call, inner):
        return call(), False


@pytest.fixture(autouse=True)
def _fake_clock(monkeypatch):
    monkeypatch.setattr(never_slower, "clock_for", lambda device, threads: Clock())


def judged(ours, agree=True, **others):
    calls = {"fasttx": iter_call(ours), **{n: iter_call(t) for n, t in others.items()}}
    return never_slower._judge("op", "case", "fp32", "step", calls, agree, "cpu", 1)


def iter_call(times):
    """Cycles through the seconds given."""
    given, at = times if isinstance(times, list) else [times], [-1]

    def call():
        at[0] += 1
        return given[at[0] % len(given)]

    return call


def test_every_op_has_a_grid():
    assert set(grid.names()) == set(ops.names()) - {"call_overhead"}


@pytest.mark.parametrize("op", grid.names())
def test_cases(op):
    cases = grid.cases(op, "bf16")
    assert cases
    assert {case.dtype for case in cases} == {"bf16"}
    assert len({case.name for case in cases}) == len(cases)
    sizes = [never_slower.grid._size(case) for case in cases]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("ours", "eager", "verdict"),
    [
        (1.0, 1.0, "pass"),
        (1.02, 1.0, "pass"),
        (1.05, 1.0, "slower"),
        (0.5, 1.0, "pass"),
        (90e-6, 80e-6, "short"),
        (93e-6, 80e-6, "short, slower"),
        ([1.2, 0.9], 1.0, "pass"),  # the interval reaches 1
    ],
)
def test_verdicts(ours, eager, verdict):
    result = judged(ours, eager=eager)
    assert result.verdict == verdict
    assert result.failed == verdict.endswith("slower")


def test_the_best_of_pytorch_counts():
    result = judged(1.0, sdpa=0.9, eager=0.95)
    assert (result.best, result.verdict) == ("sdpa", "slower")
    assert result.ratio == pytest.approx(0.9)


def test_slower_once_is_not_enough():
    """The first look, of six rounds, finds it slower; the second, of fifteen, does not."""
    slow_at_first = [1.0] * 3 + [1.2] * 6 + [1.0] * 100
    assert judged(slow_at_first, eager=1.0).verdict == "pass"


def test_a_result_of_its_own_fails():
    assert judged(0.1, agree=False, eager=1.0).verdict == "wrong"
    a = torch.randn(50)
    assert never_slower._agree(a * (1 + 1e-5), a)
    assert not never_slower._agree(a * 1.01, a)
    assert not never_slower._agree(torch.full((50,), torch.nan), a)


def test_command(tmp_path, monkeypatch, capsys):
    work = ops.find("softmax").plain
    monkeypatch.setattr(grid, "cases", lambda op, dtype: [work((4, 16), dtype)])
    monkeypatch.setattr(
        never_slower, "interleave",
        lambda calls, *a, **k: {n: timing(calls[n]) for n in calls},
    )  # fmt: skip
    target = tmp_path / "rows.json"
    arguments = ["never-slower", "softmax", "--dtype", "fp32", "--json", str(target)]
    assert main(arguments) == 0
    report = json.loads(target.read_text())
    assert report["schema"] == "fasttx-never-slower/1"
    (row,) = report["rows"]
    assert (row["op"], row["direction"], row["best"]) == ("softmax", "forward", "eager")
    assert "1 rows of 100 us and more, 0 failing" in capsys.readouterr().out
    assert main(["never-slower", "nonsense"]) == 2
    assert "never-slower has no op 'nonsense': attention" in capsys.readouterr().err


def timing(call):
    call()
    second = SimpleNamespace(median=1.0, low=1.0, high=1.0)
    return SimpleNamespace(interval=second, ratio_to=lambda base: second)
