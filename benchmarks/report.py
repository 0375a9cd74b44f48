"""What a run leaves behind: the table on the terminal, CSV, JSON, PNG plots and one HTML page."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .rows import Row, Run

FLAT = (
    "kind", "op", "case", "direction", "provider", "label", "backend", "dtype", "device", "threads",
    "clock", "median_s", "low_s", "high_s", "samples", "rejected", "converged", "coverage",
    "cold_s", "first_call_s", "warmup_s", "compile_s", "ratio_to", "ratio", "ratio_low",
    "ratio_high", "best_other", "ratio_best", "ratio_best_low", "ratio_best_high", "flops", "rate",
    "moved", "bandwidth", "share", "share_of", "error", "ok", "why",
    "tokens", "tokens_per_s", "peak_bytes",
)  # fmt: skip


KINDS = {
    "op": "Ops",
    "model": "Models",
    "layer": "Layers",
    "train": "Training",
    "generate": "Generation",
}


def seconds(value: float | None) -> str:
    """Three digits with a unit: 12.3 ms."""
    if value is None:
        return ""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return (
                f"{value / scale:.3g} {unit}"
                if value / scale < 100
                else f"{value / scale:.0f} {unit}"
            )
    return f"{value * 1e9:.3g} ns"


def spread(row: Row) -> str:
    """The interval around the median; n4: too few samples for 95 %, the range of those four."""
    if not row.median_s:
        return ""
    below = (row.low_s - row.median_s) / row.median_s
    above = (row.high_s - row.median_s) / row.median_s
    text = f"{100 * below:+.1f}/{100 * above:+.1f} %"
    if row.coverage is not None and row.coverage < 0.95:
        text += f" n{row.samples}"
    return text


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def size(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:.1f} MiB"


def _styled(ratio: float | None) -> tuple[str, str]:
    style = "" if ratio is None else "bold green" if ratio > 1.02 else "red" if ratio < 0.98 else ""
    return times(ratio), style


COLUMNS = (
    ("", 29), ("median", 8), ("95 % interval", 14), ("ratio", 7), ("vs best", 7), ("share", 5),
    ("error", 7), ("", 2), ("1st call", 8),
)  # fmt: skip


def _cells(row: Row) -> list[tuple[str, str]]:
    name = row.label + (f" ({row.backend})" if row.backend else "")
    mark = {True: "green", False: "bold red", None: ""}[row.ok]
    return [
        ("  " + name, "bold" if row.ours else ""),
        (seconds(row.median_s), ""),
        (spread(row), ""),
        _styled(row.ratio),
        _styled(row.ratio_best),
        (percent(row.share), ""),
        (error(row.error), ""),
        (row.mark, mark),
        (seconds(row.first_call_s), "dim"),
    ]


def _line(cells: list[tuple[str, str]]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for i, ((text, style), (_, width)) in enumerate(zip(cells, COLUMNS, strict=True)):
        line.append(text.ljust(width) if i == 0 else text.rjust(width), style=style)
        line.append(" ")
    return line


def table(rows: Iterable[Row], title: str = "", memory: bool = False) -> Text:
    """A block a group of providers timed against each other, a line a provider."""
    names = [title, *(name for name, _ in COLUMNS[1:])]
    lines = [_line([(name, "bold") for name in names])]
    for _, group in groupby(rows, key=lambda row: row.group):
        members = list(group)
        head = members[0]
        threads = f"{head.threads} thread{'s' if head.threads > 1 else ''}"
        where = threads if head.device == "cpu" else head.device
        lines.append(
            Text(f"{head.case} | {head.dtype} {head.direction} | {where}", style="bold underline")
        )
        for row in members:
            line = _line(_cells(row))
            if memory or row.peak_bytes is not None:
                line.append(f"peak {size(row.peak_bytes)} ")
            for name, value in (("cold start", row.cold_s), ("compiled in", row.compile_s)):
                line.append("" if value is None else f"{name} {seconds(value)} ", style="dim")
            lines.append(line)
    return Text("\n").join(lines)


def legend(run: Run) -> list[str]:
    """What the columns mean, and what must be known to read them."""
    lines = [
        "ratio: times faster than the other commit, paired by round; below 1.00x is slower."
        if any(row.ratio_to == "base" for row in run.rows)
        else "ratio: times faster than the row of 1.00x, paired by round; below that is slower. "
        "vs best: fasttx against the fastest of the others.",
        "No ratio without ✓: error within 2x (gradients 3x) of plain PyTorch's in the same dtype, "
        "both against fp64, plus one rounding. - could not be checked. n4: the range of 4 samples, "
        "too few for a 95 % interval.",
    ]
    rows = run.rows
    if any(row.clock == "thread_cpu" for row in rows):
        lines.append("1 thread: CPU time of the thread. ")
    if any(row.clock == "wall" for row in rows):
        lines[-1] += "More threads: wall time; rounds with a context switch thrown out."
    for limits in run.limits:
        rates = [f"{name} GEMM {rate / 1e9:.0f}" for name, rate in limits.gemm.items()]
        rates += [f"{name} peak {rate / 1e9:.0f}" for name, rate in limits.peak.items()]
        lines.append(
            f"Limits of this machine, {limits.threads} thread(s) on {limits.device}: "
            f"{', '.join(rates)} GFLOP/s; read {limits.read / 1e9:.0f}, "
            f"copy {limits.copy / 1e9:.0f} GB/s. share: of the highest rate in the row's dtype."
        )
    return lines


def losses(rows: Iterable[Row]) -> list[str]:
    """Every fasttx row that is slower than the best of the others, in words."""
    found = []
    for row in rows:
        if not row.ours:
            continue
        where = f"{row.case} {row.dtype} {row.direction}, {row.threads} thr."
        where += "" if row.provider == "fasttx" else f" ({row.label})"
        if row.ok is False:
            found.append(f"WRONG  {where}: {row.why}")
        elif row.ratio_best is not None and row.ratio_best < 1:
            word = "slower" if row.ratio_best_high < 1 else "equal within its interval"
            found.append(f"{word} {where}: {times(row.ratio_best)} of {row.best_other}")
    return found


def gains(run: Run) -> list[str]:
    """A model patched beside itself unpatched: a line a model, dtype and thread count."""
    lines = []
    models = [r for r in run.rows if r.kind == "model" and r.ratio_to not in (None, "base")]
    names = dict.fromkeys((row.op, row.dtype, row.device, row.threads) for row in models)
    words = {"forward": "forward", "step": "training step", "generate": "generation"}
    for name, dtype, device, threads in names:
        rows = [r for r in models if (r.op, r.dtype, r.device, r.threads) ==
                (name, dtype, device, threads)]  # fmt: skip
        parts = []
        for row in rows:
            if row.provider != "fasttx" and not (row.ours and row.direction == "generate"):
                continue
            what = words.get(row.direction, row.direction)
            what += "" if row.provider == "fasttx" else f" by {row.label}"
            what += f" {row.shape['batch']} x {row.shape['queries']}"
            base = next(r for r in rows if r.provider == r.ratio_to and r.group == row.group)
            if row.ratio is None:
                parts.append(
                    f"{what} {seconds(base.median_s)} -> {seconds(row.median_s)}, "
                    f"{'WRONG' if row.ok is False else 'not compared'}: {row.why}"
                )
            else:
                parts.append(
                    f"{what} {seconds(base.median_s)} -> {seconds(row.median_s)}, "
                    f"{times(row.ratio)}"
                )
                unpadded = [r.ratio for r in rows if r.provider == "fasttx_unpad"
                            and r.group == row.group and r.ratio is not None]  # fmt: skip
                if row.provider == "fasttx" and unpadded:
                    parts[-1] += f" ({times(unpadded[0])} with unpad=True)"
            if row.peak_bytes and base.peak_bytes:
                share = percent(row.peak_bytes / base.peak_bytes)
                parts.append(
                    f"its peak memory {size(base.peak_bytes)} -> {size(row.peak_bytes)}, {share}"
                )
        where = f"{threads} thr." if device == "cpu" else device
        gained = "; ".join(parts) or "nothing: fasttx.patch finds nothing in it that it knows"
        lines.append(f"{name} {dtype}, {where}: {gained}")
    return lines


def print_report(run: Run, console: Console, memory: bool = False) -> None:
    for kind, title in KINDS.items():
        rows = [row for row in run.rows if row.kind == kind]
        if rows:
            console.print(table(rows, title, memory), soft_wrap=True)
    for line in legend(run):
        console.print(line, style="dim", soft_wrap=True, highlight=False)
    gained = gains(run)
    if gained:
        console.print("\nWith fasttx, median times:", style="bold")
        for line in gained:
            console.print("  " + line, soft_wrap=True, highlight=False)
    lost = losses(run.rows)
    if lost:
        console.print("\nWhere fasttx does not win:", style="bold")
        for line in lost:
            console.print("  " + line, soft_wrap=True, highlight=False)
    failed = [row for row in run.rows if row.ok is False and not row.ours]
    for row in failed:
        console.print(f"  {row.label} fails the check on {row.case} {row.dtype}: {row.why}")
    for entry in run.skipped:
        text = f"  left out: {entry['what']}: {entry['why']}"
        console.print(text, style="dim", soft_wrap=True, highlight=False)
    for note in run.notes:
        console.print("  note: " + note, style="yellow")


def write_csv(run: Run, path: Path) -> Path:
    """Shape and feature fields become columns of their own, prefixed."""
    shapes = sorted({key for row in run.rows for key in row.shape})
    features = sorted({key for row in run.rows for key in row.features})
    header = [*FLAT, *(f"shape_{key}" for key in shapes), *(f"feature_{key}" for key in features)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "notes"])
        for row in run.rows:
            values = [getattr(row, name) for name in FLAT]
            values += [row.shape.get(key) for key in shapes]
            values += [row.features.get(key) for key in features]
            writer.writerow([*values, "; ".join(row.notes)])
    return path


def write_json(run: Run, path: Path) -> Path:
    """Schema in docs/benchmarks.md; infinities and NaN become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(run.as_dict()), indent=1, ensure_ascii=False) + "\n")
    return path


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_all(run: Run, folder: Path) -> list[Path]:
    """CSV, JSON, PNG plots and the HTML page; without matplotlib no plots, and it says so."""
    from . import html, plots

    written = [write_csv(run, folder / "results.csv"), write_json(run, folder / "results.json")]
    try:
        written += plots.write_all(run, folder)
    except ImportError as missing:
        run.notes.append(f"no PNG plots: {missing}")
    written.append(html.write(run, folder / "report.html"))
    return written
