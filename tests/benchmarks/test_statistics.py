"""Medians and intervals on samples whose answer is known. Nothing here reads a clock."""

import random
from statistics import median

import pytest
from fasttx.benchmarks import harness, stats


def test_order_ranks_are_the_textbook_ones():
    # Conover, Practical Nonparametric Statistics, table A3: 95 % ranks of the median.
    assert {n: stats.order_ranks(n)[0] for n in (6, 9, 12, 20, 30, 50)} == {
        6: 1, 9: 2, 12: 3, 20: 6, 30: 10, 50: 18,
    }  # fmt: skip


@pytest.mark.parametrize(("n", "coverage"), [(1, 0.0), (2, 0.5), (5, 0.9375), (6, 0.96875)])
def test_few_samples_say_what_their_range_covers(n, coverage):
    assert stats.order_ranks(n) == (1, coverage)
    assert stats.interval(range(n)).is_95 == (coverage >= 0.95)


def test_interval_covers_the_median_as_often_as_it_says():
    rng = random.Random(7)
    true_median = 2**0.5  # of a lognormal with mu = log(sqrt 2): skewed on purpose
    hits = 0
    for _ in range(2000):
        sample = [true_median * rng.lognormvariate(0, 1) for _ in range(21)]
        found = stats.interval(sample)
        assert found.low <= found.median <= found.high
        assert found.median == median(sample)
        hits += found.low <= true_median <= found.high
    assert 0.94 < hits / 2000 < 0.99


def test_one_wild_sample_moves_nothing():
    calm = [1.0 + 0.001 * i for i in range(21)]
    wild = [*calm[:-1], 1000.0]
    assert stats.interval(wild).median == stats.interval(calm).median
    assert stats.interval(wild).high == stats.interval(calm).high


def test_paired_ratio_divides_out_what_slows_both():
    rng = random.Random(3)
    slowdowns = [rng.uniform(1, 10) for _ in range(40)]
    ratio = stats.paired_ratio([6 * s for s in slowdowns], [2 * s for s in slowdowns])
    assert ratio.median == pytest.approx(3)
    assert ratio.width < 1e-9


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match="samples"):
        stats.interval([])
    with pytest.raises(ValueError, match="paired"):
        stats.paired_ratio([1.0, 2.0], [1.0])


class ScriptedClock:
    """Answers what the script says, in order; an entry is seconds or (seconds, disturbed)."""

    name = "wall"

    def __init__(self, script):
        self.script, self.order = script, []

    def measure(self, call, inner):
        name = call()
        self.order.append(name)
        taken = next(self.script[name])
        return taken if isinstance(taken, tuple) else (taken, False)


def _clock(**scripts):
    return ScriptedClock({name: iter(script) for name, script in scripts.items()})


def _calls(*names):
    return {name: (lambda name=name: name) for name in names}


def test_contenders_take_turns_and_the_order_rotates():
    clock = _clock(a=[1.0] * 20, b=[2.0] * 20)
    timings = harness.interleave(_calls("a", "b"), clock, budget_s=60)
    assert clock.order[4:] == ["a", "b", "b", "a"] * 3 + ["a", "b"]
    assert timings["a"].converged
    assert timings["b"].ratio_to(timings["a"]).median == pytest.approx(0.5)
    assert len(timings["a"].samples) == harness.ENOUGH_ROUNDS


def test_disturbed_rounds_are_dropped_for_everyone():
    warm = [1.0, 1.0]
    a = [*warm, *([1.0, (50.0, True)] * 9)]
    b = [*warm, *([2.0] * 18)]
    timings = harness.interleave(_calls("a", "b"), _clock(a=a, b=b), budget_s=60)
    assert set(timings["a"].samples) == {1.0}
    assert len(timings["a"].samples) == len(timings["b"].samples) >= harness.ENOUGH_ROUNDS
    assert timings["a"].rejected > 0
    assert timings["b"].rejected == 0


def test_when_nothing_is_clean_the_disturbed_rounds_stay_and_it_is_said():
    a = [1.0, 1.0, *([(3.0, True)] * 20)]
    timings = harness.interleave(_calls("a"), _clock(a=a), budget_s=0.0)
    assert timings["a"].samples == [3.0] * harness.MIN_ROUNDS
    assert "disturbed" in timings["a"].notes[0]
    assert not timings["a"].interval.is_95
