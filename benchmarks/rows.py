"""One measured row, and one whole run: what the table, CSV, JSON, plots and HTML are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .gate import Verdict
from .harness import Timing
from .limits import Limits

SCHEMA = "fasttx-bench/1"


@dataclass
class Row:
    """Every field is explained in docs/benchmarks.md. Seconds, bytes, and rates per second."""

    kind: str
    op: str
    case: str
    direction: str
    provider: str
    label: str
    dtype: str
    device: str
    threads: int
    clock: str
    shape: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None
    median_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    samples: int = 0
    rejected: int = 0
    converged: bool = False
    coverage: float | None = None
    cold_s: float | None = None
    first_call_s: float | None = None
    warmup_s: float | None = None
    compile_s: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratio_to: str | None = None
    best_other: str | None = None
    ratio_best: float | None = None
    ratio_best_low: float | None = None
    ratio_best_high: float | None = None
    flops: int | None = None
    rate: float | None = None
    moved: int | None = None
    bandwidth: float | None = None
    share: float | None = None
    share_of: str | None = None
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    plain_errors: dict[str, float] = field(default_factory=dict)
    ok: bool | None = None
    why: str = ""
    tokens: int | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        return self.provider.startswith("fasttx")

    @property
    def mark(self) -> str:
        return {True: "✓", False: "✗", None: "-"}[self.ok]

    @property
    def group(self) -> tuple:
        """Rows of one group were timed against each other."""
        return (self.op, self.case, self.direction, self.dtype, self.device, self.threads)

    def set_timing(self, timing: Timing, prepared_s: float | None = None) -> None:
        """prepared_s: of a provider that compiles or converts, the wall time that this took
        before the first timed call."""
        result = timing.interval
        self.median_s, self.low_s, self.high_s = result.median, result.low, result.high
        self.samples, self.rejected = result.n, timing.rejected
        self.coverage, self.converged = result.coverage, timing.converged
        self.first_call_s, self.warmup_s = timing.first_call_s, timing.warmup_s
        if prepared_s is not None:
            self.compile_s = prepared_s + max(0.0, timing.first_call_s - result.median)
        self.notes.extend(timing.notes)

    def set_rate(self, flops: int | None, limits: Limits | None, moved: int | None = None) -> None:
        """FLOP/s and byte/s, and the share of whichever of the machine's limits is nearer."""
        self.flops, self.moved = flops, moved
        if not self.median_s:
            return
        shares = []
        if flops:
            self.rate = flops / self.median_s
            best = limits.flops(self.dtype) if limits is not None else None
            if best is not None:
                shares.append((self.rate / best[0], best[1]))
        if moved:
            self.bandwidth = moved / self.median_s
            if limits is not None and limits.copy:
                best = max(limits.copy, limits.read)
                shares.append((self.bandwidth / best, f"memory bandwidth, {limits.threads} thr."))
        if shares:
            self.share, self.share_of = max(shares)

    def set_tokens(self, tokens: int) -> None:
        self.tokens = tokens
        if self.median_s:
            self.tokens_per_s = tokens / self.median_s

    def set_verdict(self, verdict: Verdict) -> None:
        self.ok, self.why, self.error = verdict.ok, verdict.why, verdict.worst
        self.errors = {name: error.rms for name, error in verdict.errors.items()}
        self.plain_errors = {name: error.rms for name, error in verdict.plain.items()}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def set_ratios(rows: list[Row], timings: dict[str, Timing], base: str) -> None:
    """Ratios to ``base`` for rows that passed the gate; the others keep none, whatever their speed.

    The base's own row shows 1 where its answer passed or could not be checked, nothing where it is
    wrong: then there is nothing honest to be faster than, and no row gets a ratio.
    """
    base_row = next((row for row in rows if row.provider == base), None)
    if base_row is None or base_row.ok is False or base not in timings:
        return
    for row in rows:
        row.ratio_to = base
        if row is base_row:
            row.ratio = row.ratio_low = row.ratio_high = 1.0
        elif row.ok and row.provider in timings:
            ratio = timings[row.provider].ratio_to(timings[base])
            row.ratio, row.ratio_low, row.ratio_high = ratio.median, ratio.low, ratio.high
    _set_best(rows, timings)


def _set_best(rows: list[Row], timings: dict[str, Timing]) -> None:
    """fasttx beside the fastest of the others whose answer is not wrong, whoever that is."""
    others = [row for row in rows if not row.ours and row.ok is not False]
    others = [row for row in others if row.provider in timings]
    if not others:
        return
    best = min(others, key=lambda row: timings[row.provider].interval.median)
    for row in rows:
        if row.ours and row.ok and row.provider in timings:
            ratio = timings[row.provider].ratio_to(timings[best.provider])
            row.best_other, row.ratio_best = best.provider, ratio.median
            row.ratio_best_low, row.ratio_best_high = ratio.low, ratio.high


@dataclass
class Run:
    """A whole invocation of ``fasttx bench``."""

    command: str
    started: str
    machine: dict[str, Any]
    limits: list[Limits] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    musts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def skip(self, what: str, why: str) -> None:
        entry = {"what": what, "why": why}
        if entry not in self.skipped:
            self.skipped.append(entry)

    def limits_for(self, device: str, threads: int) -> Limits | None:
        found = (
            limit for limit in self.limits if (limit.device, limit.threads) == (device, threads)
        )
        return next(found, None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "command": self.command,
            "started": self.started,
            "seconds": self.seconds,
            "machine": self.machine,
            "limits": [limit.as_dict() for limit in self.limits],
            "rows": [row.as_dict() for row in self.rows],
            "musts": self.musts,
            "skipped": self.skipped,
            "notes": self.notes,
        }
