"""Medians with distribution-free intervals: nothing here assumes that times are normal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Median of ``n`` samples with the interval [low, high] that covers the true median.

    ``coverage`` is the exact probability of that; with fewer than six samples even [min, max]
    stays under 95 % and ``coverage`` says by how much.
    """

    median: float
    low: float
    high: float
    n: int
    coverage: float

    @property
    def width(self) -> float:
        """(high - low) / median: 0.03 means the interval is 3 % wide."""
        return (self.high - self.low) / self.median if self.median else float("inf")

    @property
    def is_95(self) -> bool:
        return self.coverage >= CONFIDENCE


def order_ranks(n: int, confidence: float = CONFIDENCE) -> tuple[int, float]:
    """The largest k such that [x(k), x(n+1-k)] (1-based ranks) still covers the median.

    Coverage of that interval is 1 - 2 * P(Binomial(n, 1/2) <= k - 1), whatever the distribution
    of the samples. Returns (k, coverage); k = 1 is the whole range.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    tail, best = 0, (1, 1.0 - 2.0 * 0.5**n if n > 1 else 0.0)
    for k in range(1, (n + 1) // 2 + 1):
        tail += comb(n, k - 1)
        coverage = 1.0 - 2.0 * tail / 2**n
        if coverage < confidence:
            break
        best = (k, coverage)
    return best


def interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Median and its order-statistic interval."""
    if not samples:
        raise ValueError("samples must hold at least one value, got none")
    ordered = sorted(samples)
    n = len(ordered)
    k, coverage = order_ranks(n, confidence)
    return Interval(median(ordered), ordered[k - 1], ordered[n - k], n, coverage)


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> Interval:
    """Median over rounds of base time / other time: above 1 means ``other`` is faster.

    The two samples of a round were taken one right after the other, so whatever slowed the whole
    machine for a while divides out.
    """
    if len(base) != len(other):
        raise ValueError(f"rounds must be paired, got {len(base)} and {len(other)} samples")
    return interval([a / b for a, b in zip(base, other, strict=True)])
