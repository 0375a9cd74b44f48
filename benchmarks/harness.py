"""The timing protocol.

All contenders of a group live in one process and take turns, A B C A B C, the order rotating from
round to round, until every one's 95 % interval of the median is under 3 % of it or the time budget
is spent; then the interval reached is what is printed. Which clock tells the truth depends on where
the work runs:

- one CPU thread: CPU time of the calling thread, which another process cannot inflate;
- several CPU threads: wall time, and a round in which the kernel took a core away from us
  (``ru_nivcsw``) is thrown out and counted;
- CUDA: events around each call, with the L2 cache overwritten before it.

A call with a method `measure(inner)` times itself: one in a process of its own (apart.py).
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .stats import Interval, interval, paired_ratio

TARGET_WIDTH = 0.03
MIN_ROUNDS = 3
ENOUGH_ROUNDS = 7
MAX_ROUNDS = 301
MIN_SAMPLE_S = 2e-3
MAX_INNER = 1000
SLOW_S, LONG_S = 0.2, 0.5  # first calls after which one warm-up, or none, is enough

Call = Callable[[], object]


class Clock(Protocol):
    name: str

    def measure(self, call: Call, inner: int) -> tuple[float, bool]:
        """Seconds per call over ``inner`` calls, and whether the sample was disturbed."""


class ThreadClock:
    """CPU time of the calling thread: right for work that runs on one thread."""

    name = "thread_cpu"

    def measure(self, call: Call, inner: int) -> tuple[float, bool]:
        start = time.thread_time()
        for _ in range(inner):
            call()
        return (time.thread_time() - start) / inner, False


class WallClock:
    """Wall time; a sample with an involuntary context switch in it counts as disturbed."""

    name = "wall"

    def measure(self, call: Call, inner: int) -> tuple[float, bool]:
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        start = time.perf_counter()
        for _ in range(inner):
            call()
        elapsed = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        return elapsed / inner, after > switches


class CudaClock:
    """CUDA events around each call, the L2 cache flushed before it by writing a larger buffer."""

    name = "cuda_event"

    def __init__(self, device: torch.device):
        properties = torch.cuda.get_device_properties(device)
        size = 2 * getattr(properties, "L2_cache_size", 64 << 20)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def measure(self, call: Call, inner: int) -> tuple[float, bool]:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(inner)
        ]
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / inner * 1e-3, False


def clock_for(device: torch.device, threads: int) -> Clock:
    if device.type == "cuda":
        return CudaClock(device)
    return ThreadClock() if threads == 1 else WallClock()


@dataclass
class Timing:
    """Seconds per call of one contender, one entry a kept round."""

    name: str
    clock: str
    inner: int = 1
    first_call_s: float = 0.0
    warmup_s: float = 0.0
    samples: list[float] = field(default_factory=list)
    rejected: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def interval(self) -> Interval:
        return interval(self.samples)

    @property
    def converged(self) -> bool:
        result = self.interval
        return result.is_95 and result.width < TARGET_WIDTH

    def ratio_to(self, base: Timing) -> Interval:
        """How many times faster than ``base`` this contender is, paired by round."""
        return paired_ratio(base.samples, self.samples)


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    budget_s: float,
    *,
    min_rounds: int = MIN_ROUNDS,
    on_round: Callable[[int, dict[str, Timing]], None] | None = None,
) -> dict[str, Timing]:
    """Times the calls against each other. ``budget_s`` is wall time for the whole group.

    At least ``min_rounds`` rounds are taken even where they overrun the budget. Rounds disturbed by
    context switches are dropped whole, so that the samples of all contenders stay paired; if fewer
    than ``ENOUGH_ROUNDS`` rounds stayed clean the disturbed ones are kept too and a note says so.
    """
    if not calls:
        return {}
    timings = {name: _warm_up(name, call, clock) for name, call in calls.items()}
    names = list(calls)
    disturbed: list[dict[str, float]] = []
    deadline = time.monotonic() + budget_s
    rounds = 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while rounds < MAX_ROUNDS:
            turn = rounds % len(names)
            order = names[turn:] + names[:turn]
            taken, clean = {}, True
            for name in order:
                seconds, hit = _measure(clock, calls[name], timings[name].inner)
                taken[name] = seconds
                if hit:
                    clean = False
                    timings[name].rejected += 1
            rounds += 1
            if clean:
                for name, seconds in taken.items():
                    timings[name].samples.append(seconds)
            else:
                disturbed.append(taken)
            if on_round is not None:
                on_round(rounds, timings)
            if rounds >= min_rounds and time.monotonic() > deadline:
                break
            if _settled(timings):
                break
    finally:
        if collecting:
            gc.enable()
    _keep_disturbed_if_needed(timings, disturbed)
    return timings


def _measure(clock: Clock, call: Call, inner: int) -> tuple[float, bool]:
    own = getattr(call, "measure", None)
    return clock.measure(call, inner) if own is None else own(inner)


def _settled(timings: Mapping[str, Timing]) -> bool:
    return all(
        len(timing.samples) >= ENOUGH_ROUNDS and timing.converged for timing in timings.values()
    )


def _keep_disturbed_if_needed(
    timings: Mapping[str, Timing], disturbed: list[dict[str, float]]
) -> None:
    clean = min(len(timing.samples) for timing in timings.values())
    if clean >= ENOUGH_ROUNDS or not disturbed:
        return
    for name, timing in timings.items():
        timing.samples.extend(taken[name] for taken in disturbed)
        timing.notes.append(
            f"only {clean} rounds without a context switch: {len(disturbed)} disturbed rounds kept"
        )


def _warm_up(name: str, call: Call, clock: Clock) -> Timing:
    """First call (compilation, lazy loading, page faults) apart, then the sample's length."""
    timing = Timing(name, clock.name)
    start = time.perf_counter()
    spent = [time.thread_time(), time.process_time()]
    call()
    if clock.name == "cuda_event":
        torch.cuda.synchronize()
    timing.first_call_s = seconds = time.perf_counter() - start
    if seconds < LONG_S:
        spent = [time.thread_time(), time.process_time()]
        more = 2 if seconds < SLOW_S else 1
        seconds = min(_measure(clock, call, 1)[0] for _ in range(more))
    timing.warmup_s = time.perf_counter() - start
    spent = [time.thread_time() - spent[0], time.process_time() - spent[1]]
    timing.inner = max(1, min(MAX_INNER, int(MIN_SAMPLE_S / max(seconds, 1e-7)) + 1))
    if clock.name == "thread_cpu" and spent[1] > 1.25 * spent[0] + 1e-3:
        timing.notes.append(
            f"other threads worked too: {spent[1]:.3g} s of process CPU time "
            f"for {spent[0]:.3g} s of this thread's"
        )
    return timing
