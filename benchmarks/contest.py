"""Contenders of one group of rows: whoever they are, timed against each other and told alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .gate import Verdict
from .harness import Call, clock_for, interleave
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
