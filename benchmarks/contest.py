"""Contenders of one group of rows: whoever they are, timed against each other and told alike.

A module of models/ offers groups: `cases(name, options)` says which, its `Bench` makes the
contenders and checks them, its `fresh` makes one of them alone for a fresh process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .gate import Verdict
from .harness import Call, Timing, clock_for, interleave
from .rows import Row, Run, set_ratios


@dataclass
class Contender:
    """label: for people. prepared_s: of one that compiles or converts, the wall time of that."""

    label: str
    call: Call
    verdict: Verdict
    prepared_s: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Group:
    """What the rows of a group share; tokens and flops are those of one call."""

    kind: str
    op: str
    case: str
    direction: str
    dtype: str
    base: str
    shape: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    flops: int | None = None
    moved: int | None = None
    tokens: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A group that can be asked for. made: arguments of its module's Bench. given: those of the
    Bench's `contest`. Its `fresh` takes both. memory: its peak is measured without being asked."""

    title: str
    made: dict[str, Any]
    given: dict[str, Any]
    threads: int
    memory: bool = False


class Bench:
    """A model or a layer on one device, as everyone runs it."""

    device: torch.device
    run: Run

    def contest(self, threads: int, **given: Any) -> tuple[Group, dict[str, Contender]]:
        """What is timed, checked already."""
        raise NotImplementedError

    def measure(self, threads: int, budget_s: float, on_round=None, **given: Any) -> list[Row]:
        group, contenders = self.contest(threads, **given)
        return compare(group, contenders, self.device, threads, budget_s, self.run, on_round)


def compare(
    group: Group,
    contenders: Mapping[str, Contender],
    device: torch.device,
    threads: int,
    budget_s: float,
    run: Run,
    on_round=None,
) -> list[Row]:
    """A row a contender; ratios to ``group.base``."""
    calls = {name: contender.call for name, contender in contenders.items()}
    timings = interleave(calls, clock_for(device, threads), budget_s, on_round=on_round)
    return rows_of(group, contenders, timings, device, threads, run)


def rows_of(
    group: Group,
    contenders: Mapping[str, Contender],
    timings: dict[str, Timing],
    device: torch.device,
    threads: int,
    run: Run,
) -> list[Row]:
    rows = []
    for name, contender in contenders.items():
        timing = timings[name]
        row = Row(
            group.kind, group.op, group.case, group.direction, name, contender.label, group.dtype,
            str(device), threads, timing.clock, dict(group.shape), dict(group.features),
        )  # fmt: skip
        row.set_timing(timing, contender.prepared_s)
        row.set_rate(group.flops, run.limits_for(str(device), threads), group.moved)
        row.set_verdict(contender.verdict)
        if group.tokens is not None:
            row.set_tokens(group.tokens)
        row.notes.extend([*group.notes, *contender.notes])
        rows.append(row)
    set_ratios(rows, timings, group.base)
    return rows


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the wall seconds it took."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start
