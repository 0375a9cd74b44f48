"""``fasttx bench attention --suite musts``: every speed goal beside what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from . import fresh, goals, ops, report
from .gate import Error
from .harness import clock_for, interleave
from .ops import attention, generic
from .ops.attention_case import Case, tensors
from .ops.attention_check import exact_answer
from .options import Options
from .providers import find
from .rows import Row, Run
from .session import GROUP_SECONDS, Session

CPU = torch.device("cpu")
CHILD_TIMEOUT_S = 900


def execute(options: Options, console: Console) -> int:
    """Runs every goal; a miss is a result, so only a wrong answer makes the exit code 1."""
    wrong = False
    for op in options.ops:
        run = _measure(op, options, console)
        console.print(report.table(run.rows, op), soft_wrap=True)
        for line in (*report.legend(run), "", *must_lines(run)):
            console.print(line, highlight=False, soft_wrap=True)
        folder = options.out or results_folder(run.machine["class"])
        for path in (
            report.write_csv(run, folder / f"{op}.csv"),
            report.write_json(run, folder / f"{op}.json"),
            write_markdown(run, op, folder / f"{op}.md"),
        ):
            console.print(f"wrote {path.resolve()}", soft_wrap=True, highlight=False)
        wrong = wrong or any(row.provider == "fasttx" and row.ok is False for row in run.rows)
    return 1 if wrong else 0


def _measure(op: str, options: Options, console: Console) -> Run:
    names = ("fasttx", "sdpa") if op == "attention" else ("fasttx", "eager")
    options = replace(options, suite="musts", ops=(op,), models=(), providers=names)
    session = Session(options, console)
    run, start = session.run, time.monotonic()
    session.measure_limits()
    stages = STAGES if op == "attention" else {"ratios": generic_stage}
    for name, stage in stages.items():
        if options.stages and name not in options.stages:
            run.notes.append(f"stage {name} was not asked for")
            continue
        try:
            stage(session)
        except KeyboardInterrupt:
            run.notes.append(f"interrupted in stage {name}: what was measured so far is here")
            break
    run.seconds = time.monotonic() - start
    return run


def generic_stage(session: Session) -> None:
    """The goals of an op that stand in its own cases."""
    (op,) = session.options.ops
    module = ops.find(op)
    cases = getattr(module, "must_cases", module.quick_cases)(session.options.dtypes)
    budget = session.options.budget_s or GROUP_SECONDS["musts"]
    for case in cases:
        problem = generic.Problem(case, CPU)
        for direction in case.directions:
            more = {key[1] for key in case.goals if isinstance(key, tuple) and key[0] == direction}
            for threads in sorted({*session.options.threads, *more}):
                if threads > len(os.sched_getaffinity(0)):
                    session.run.skip(f"{case.case}, {threads} threads", "too few cores")
                    continue
                torch.set_num_threads(threads)
                rows = generic.measure(
                    problem, direction, session.providers, threads, budget, session.run
                )
                session.run.rows += rows
                for row in rows:
                    if row.provider == "fasttx":
                        for entry in generic_entries(case, row):
                            record(session, entry)


def generic_entries(case: generic.Work, row: Row) -> list[dict[str, Any]]:
    """Everything demanded of one row."""
    key = row.direction if row.threads == 1 else (row.direction, row.threads)
    must, aim = case.goals.get(key, (None, None))
    found = [_ratio_entry(goals.Goal(f"{case.dtype} {row.direction}", (), must, aim), row)]
    if row.threads != 1:
        found[0] |= _demand(must, aim, row.ratio, row.ok, "x")
        return found
    if row.direction in case.times:
        must, aim = (None if t is None else t * 1e6 for t in case.times[row.direction])
        value = None if row.median_s is None else row.median_s * 1e6
        found.append(_one_entry("time of a call", case, row, value, must, aim, " us", True))
    if row.direction in case.shares:
        value = None if row.share is None else row.share * 100
        must = case.shares[row.direction] * 100
        what = f"share of {row.share_of}"
        found.append(_one_entry(what, case, row, value, must, None, " %", False))
    return found


def _one_entry(what, case, row: Row, value, must, aim, unit: str, at_most: bool) -> dict[str, Any]:
    goal = f"{case.dtype} {row.direction}, {what}"
    return {
        "goal": goal, "what": f"{goal}: {row.case}", "value": value, "low": None, "high": None,
        "measured": "none" if value is None else f"{value:.3g}{unit}", "unit": unit,
        **_demand(must, aim, value, row.ok, unit, at_most),
    }  # fmt: skip


def _demand(must, aim, value, ok, unit: str, at_most: bool = False) -> dict[str, Any]:
    sign = "<=" if at_most else ">="
    reached = None
    if aim is not None and value is not None:
        reached = value <= aim if at_most else value >= aim
    return {
        "must": "" if must is None else f"{sign} {must:g}{unit}",
        "aim": "" if aim is None else f"{aim:g}{unit}",
        "aim_reached": reached,
        "verdict": verdict(value, must, ok, at_most),
    }


def results_folder(machine_class: str) -> Path:
    """benchmarks/results/<class> in a checkout, else under the current directory."""
    here = Path(__file__).resolve().parent
    home = here if (here.parent / ".git").exists() else Path("reports")
    return home / "results" / machine_class


def verdict(value: float | None, must: float | None, ok: bool | None, at_most: bool) -> str:
    if ok is False:
        return "WRONG"
    if value is None:
        return "UNCHECKED"
    if must is None:
        return "-"
    return "PASS" if (value <= must if at_most else value >= must) else "MISS"


def record(session: Session, entry: dict[str, Any]) -> None:
    session.run.musts.append(entry)
    text = f"{entry['verdict']:9} {entry['what']}: {entry['measured']} (must {entry['must']})"
    session.console.print(text, highlight=False, soft_wrap=True)


def _ratio_entry(goal: goals.Goal, row: Row) -> dict[str, Any]:
    judged = row.threads == 1
    must = goal.must if judged else None
    low, high = row.ratio_low, row.ratio_high
    measured = "none: " + row.why if row.ratio is None else f"{row.ratio:.2f}x"
    if low is not None:
        measured += f" [{low:.2f}, {high:.2f}]"
    return {
        "goal": goal.what,
        "what": f"{goal.what}: {row.case}" + ("" if judged else f", {row.threads} threads"),
        "value": row.ratio,
        "low": low,
        "high": high,
        "share": row.share,
        "measured": measured,
        **_demand(must, goal.aim if judged else None, row.ratio, row.ok, "x"),
    }


def ratio_stage(session: Session, chosen: tuple[goals.Goal, ...] = goals.RATIOS) -> None:
    """Rows of one case share their fp64 answer, so goals are walked case by case."""
    wanted: dict[Case, list[tuple[str, goals.Goal]]] = {}
    for goal in chosen:
        for case, direction in goal.rows:
            wanted.setdefault(case, []).append((direction, goal))
    budget = session.options.budget_s or GROUP_SECONDS["musts"]
    for case, jobs in wanted.items():
        problem = attention.Problem(case, CPU)
        for direction, goal in jobs:
            for threads in session.options.threads:
                torch.set_num_threads(threads)
                rows = attention.measure(
                    problem, direction, session.providers, threads, budget, session.run
                )
                session.run.rows += rows
                for row in rows:
                    if row.provider == "fasttx":
                        record(session, _ratio_entry(goal, row))


def forced_stage(session: Session) -> None:
    """The same rows in a process of its own where fasttx is held to a lower instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "rows.json")
        budget = session.options.budget_s or GROUP_SECONDS["musts"]
        command = [sys.executable, "-m", __name__, str(target), str(budget)]
        done = subprocess.run(
            command,
            env=os.environ | {"FASTTX_CPU_ISA": goals.FORCED[0].isa},
            capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False,
            cwd=fresh.SOURCE_ROOT,
        )  # fmt: skip
        if done.returncode != 0:
            session.run.skip("forced avx2", done.stderr.strip().splitlines()[-1][:300])
            return
        found = json.loads(target.read_text())
    for row in found["rows"]:
        row["features"]["isa"] = goals.FORCED[0].isa
        row["case"] += " (forced avx2)"
        session.run.rows.append(Row(**row))
    for must in found["musts"]:
        record(session, must)


def _child(target: str, budget: str) -> None:
    from rich.console import Console as Quiet

    options = Options(suite="musts", providers=("fasttx", "sdpa"), budget_s=float(budget))
    session = Session(options, Quiet(stderr=True, quiet=True))
    session.measure_limits()
    ratio_stage(session, goals.FORCED)
    data = {"rows": [row.as_dict() for row in session.run.rows], "musts": session.run.musts}
    Path(target).write_text(json.dumps(report.finite(data)))


def cost_stage(session: Session) -> None:
    torch.set_num_threads(1)
    budget = (session.options.budget_s or GROUP_SECONDS["musts"]) / 2
    provider = find()["fasttx"]
    for goal in goals.COSTS:
        calls = {}
        for name, case in (("plain", goal.plain), ("feature", goal.feature)):
            x = tensors(case)
            call, leaves = provider.attention(case, x, check=False)
            calls[name] = attention.timed_call(call, leaves, x.dout, goal.direction)
        timings = interleave(calls, clock_for(CPU, 1), budget)
        pairs = goal.feature.visible_pairs() / goal.plain.visible_pairs()
        ratio = timings["feature"].ratio_to(timings["plain"])
        value, low, high = (pairs * part for part in (ratio.median, ratio.low, ratio.high))
        record(
            session,
            {
                "goal": "rate per visible pair with a feature",
                "what": f"rate per visible pair beside the plain kernel: {goal.what}",
                "value": value,
                "low": low,
                "high": high,
                "measured": f"{value:.2f} [{low:.2f}, {high:.2f}]",
                "must": f">= {goal.must:g}",
                "aim": "",
                "verdict": verdict(value, goal.must, None, at_most=False),
            },
        )


def error_stage(session: Session) -> None:
    torch.set_num_threads(max(session.options.threads))
    providers = {name: find()[name] for name in ("fasttx", "sdpa")}
    for goal in goals.ERRORS:
        errors = seed_errors(goal.case, providers, goals.SEEDS)
        ratios = {
            tensor: median(errors["fasttx"][tensor]) / median(errors["sdpa"][tensor])
            for tensor in errors["sdpa"]
        }
        worst = max(ratios.values())
        each = ", ".join(f"{tensor} {ratio:.2f}" for tensor, ratio in ratios.items())
        record(
            session,
            {
                "goal": f"{goal.case.dtype} error beside SDPA's",
                "what": f"{goal.case.dtype} relative RMS error beside SDPA's: {goal.case.name}",
                "value": worst,
                "errors": {
                    name: {t: median(e) for t, e in found.items()} for name, found in errors.items()
                },
                "measured": f"{worst:.3f}x ({each})",
                "must": f"<= {goal.must:g}x",
                "aim": "",
                "verdict": verdict(worst, goal.must, None, at_most=True),
            },
        )


def seed_errors(case: Case, providers: dict, seeds: int) -> dict[str, dict[str, list[float]]]:
    """{provider: {tensor: relative RMS errors, one a seed}} of out, dq, dk, dv against fp64."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in providers}
    for seed in range(seeds):
        x = tensors(case, seed=seed)
        exact = exact_answer(case, x)
        for name, provider in providers.items():
            call, leaves = provider.attention(case, x, check=True)
            actual = attention.results(call, leaves, x.dout, gradients=True)
            errors: dict[str, Error] = exact.errors(actual)
            for tensor, error in errors.items():
                found[name].setdefault(tensor, []).append(error.rms)
    return found


def memory_stage(session: Session) -> None:
    small, large = goals.MEMORY_SIZES
    for goal in goals.MEMORY:
        peaks = []
        for size in (small, large):
            case = replace(goal.case, queries=size, keys=size)
            peaks.append(fresh.attention(case, goal.direction, "memory", "fasttx", 1, "cpu"))
        known = None not in peaks and peaks[0]
        growth = peaks[1] / peaks[0] if known else None
        matrix = goal.case.heads * large * large * goal.case.torch_dtype.itemsize
        text = "none: the process failed"
        if known:
            text = f"{growth:.1f}x ({report.size(peaks[0])} -> {report.size(peaks[1])}; "
            text += f"N x N: {report.size(matrix)})"
        features = ", ".join(goal.case.features) or "plain"
        record(
            session,
            {
                "goal": "peak memory O(S)",
                "what": f"peak memory above the inputs, S {small} -> {large}: "
                f"{goal.case.dtype} {goal.direction}, {features}",
                "value": growth,
                "peak_bytes": peaks,
                "measured": text,
                "must": f"<= {goal.must:g}x",
                "aim": "4x",
                "verdict": verdict(growth, goal.must, None, at_most=True),
            },
        )


STAGES = {
    "ratios": ratio_stage,
    "forced": forced_stage,
    "costs": cost_stage,
    "errors": error_stage,
    "memory": memory_stage,
}


def must_lines(run: Run) -> list[str]:
    counts: dict[str, int] = {}
    for must in run.musts:
        counts[must["verdict"]] = counts.get(must["verdict"], 0) + 1
    lines = [", ".join(f"{count} {name}" for name, count in sorted(counts.items()))]
    for must in run.musts:
        if must["verdict"] not in ("PASS", "-"):
            lines.append(
                f"{must['verdict']} {must['what']}: {must['measured']}, must {must['must']}"
            )
    return lines


def summary(run: Run) -> list[str]:
    """A Markdown table with a line a goal: the range over its cases, and how many reach it."""
    lines = [
        "| goal | lowest to highest case | must | aim | reached |",
        "| --- | --- | --- | --- | --- |",
    ]
    for goal in dict.fromkeys(must["goal"] for must in run.musts):
        members = [must for must in run.musts if must["goal"] == goal]
        values = [must["value"] for must in members if must["value"] is not None]
        reached = sum(must["verdict"] == "PASS" for must in members)
        unit = members[0].get("unit") or ("x" if "rate per" not in goal else "")
        texts = (
            [f"{value:.2f}{unit}" for value in (min(values), max(values))] if values else ["none"]
        )
        demands = dict.fromkeys(must["must"] for must in members)
        counted = f"{reached} of {len(members)}" if any(demands) else ""
        cells = [goal, " to ".join(dict.fromkeys(texts)), " or ".join(demands), members[0]["aim"]]
        lines.append("| " + " | ".join([*cells, counted]) + " |")
    return lines


def write_markdown(run: Run, op: str, path: Path) -> Path:
    machine = run.machine
    versions = ", ".join(f"{n} {v}" for n, v in machine["packages"].items() if v)
    lines = [
        f"# {op}: goals and what was measured",
        "",
        f"- Command: `{run.command}`",
        f"- Date: {run.started}, took {run.seconds:.0f} s",
        f"- Machine: {machine['cpu']} ({machine['class']}), {machine['cores']} cores, "
        f"load average at the start {machine['load_average'][0]:.2f}",
        f"- Versions: Python {machine['python']}, {versions}, commit {machine['commit']}",
        *(f"- {line}" for line in report.legend(run)),
        "",
        *(f"- {line}" for line in must_lines(run)[:1]),
        "",
        *summary(run),
        "",
        "| goal and case | measured | share of limit | must | aim | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for must in run.musts:
        share = report.percent(must.get("share"))
        cells = [must["what"], must["measured"], share, must["must"], must["aim"], must["verdict"]]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- Left out: {s['what']}: {s['why']}" for s in run.skipped)]
    lines += [f"- Note: {note}" for note in run.notes]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


if __name__ == "__main__":
    _child(*sys.argv[1:])
