"""One run from plan to rows: groups in order, each with its share of the time that is left."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import limits, machine, ops, plans, providers, report
from .ops import attention, generic
from .ops.attention_case import DTYPES
from .options import Options, UsageError
from .plans import Step
from .rows import Row, Run

QUICK_SECONDS = 170.0
QUICK_LAST_SECONDS = 205.0
FOLDER_SECONDS = 60.0
FOLDER_LAST_SECONDS = 95.0
GROUP_SECONDS = {"quick": 2.5, "full": 8.0, "musts": 8.0}


class Session:
    def __init__(self, options: Options, console: Console):
        self.options, self.console = options, console
        self.device = torch.device(options.device)
        self.run = Run(
            options.command, datetime.now(UTC).isoformat(timespec="seconds"), machine.describe()
        )
        self.run.notes.extend(options.notes)
        self.providers = self._usable_providers()
        if self.device.type == "cuda":
            self.run.notes.append("the CUDA path of this benchmark has not been tested yet")

    def _usable_providers(self) -> dict:
        found = providers.find()
        found["fasttx"].BACKEND = self.options.backend
        usable = {}
        for name, provider in found.items():
            if self.options.providers and name not in self.options.providers:
                continue
            why = provider.reason()
            if why is None:
                usable[name] = provider
            elif self._concerns(provider):
                self.run.skip(provider.LABEL, why)
        return usable

    def _concerns(self, provider) -> bool:
        """Whether a provider would have had a part in this run."""
        options = self.options
        asked = {
            "attention": "attention" in options.ops,
            "op": options.ops and options.ops != ("attention",),
            "model_forward": options.models and options.suite == "full",
            "generation": options.generation,
        }
        return any(on and hasattr(provider, does) for does, on in asked.items())

    def cases(self, module: ModuleType) -> list:
        try:
            return ops.cases(module, **self.chosen())
        except LookupError as why:
            self.run.skip(module.__name__.rsplit(".", 1)[-1], str(why))
            return []

    def chosen(self) -> dict:
        """Which cases, for ops.cases."""
        o = self.options
        shape = (o.batch, o.heads, o.head_dim)
        return {"suite": o.suite, "dtypes": o.dtypes, "sizes": o.sizes, "shape": shape}

    def plan(self) -> list[Step]:
        steps = []
        for name in self.options.ops:
            module = ops.find(name)
            for case in self.cases(module):
                steps += self._op_steps(module, case)
        return steps + plans.models(self)

    def _op_steps(self, module: ModuleType, case) -> list[Step]:
        holder: dict[str, object] = {}
        source = module if hasattr(module, "Problem") else generic
        budget = self.options.budget_s or GROUP_SECONDS[self.options.suite]
        directions = self.options.directions
        if self.options.default_directions:
            directions = getattr(case, "directions", directions)
        jobs = [(t, d) for t in self.options.threads for d in directions]
        steps = []
        for threads, direction in jobs:

            def measure(seconds, on_round, threads=threads, direction=direction):
                torch.set_num_threads(threads)
                if not holder:
                    holder[""] = source.Problem(case, self.device, directions != ("forward",))
                rows = source.measure(
                    holder[""], direction, self.providers, threads, seconds, self.run,
                    everything=self.options.suite == "full" or bool(self.options.providers),
                    on_round=on_round,
                )  # fmt: skip
                if (threads, direction) == jobs[-1]:
                    holder.clear()
                return self._fresh(rows, source, case, direction, threads)

            title = f"{case.name} {case.dtype} {direction}, {threads} thr."
            steps.append(Step(title, budget, measure))
        return steps

    def _fresh(self, rows: list[Row], source, case, direction: str, threads: int) -> list[Row]:
        if source is attention:
            about = {"case": asdict(case), "direction": direction}
            return plans.add_fresh(self, rows, "ops.attention:fresh", threads, **about)
        about = {"op": case.op, "case": case.case, "dtype": case.dtype, "direction": direction}
        return plans.add_fresh(self, rows, "ops.generic:fresh", threads, **about)

    def measure_limits(self) -> None:
        wanted = set(self.options.threads)
        several = "bert" in self.options.models or self.options.generation
        if several and self.device.type == "cpu":
            wanted.update(self.options.model_threads)
        for threads in sorted(wanted):
            torch.set_num_threads(threads)
            dtypes = {name: DTYPES[name] for name in self.options.dtypes}
            self.run.limits.append(limits.measure(self.device, threads, dtypes))

    def execute(self) -> Run:
        """Runs the plan with live progress. What was measured is kept when interrupted. UsageError
        where there is nothing to run."""
        start = time.monotonic()
        steps = self.plan()
        if not steps:
            why = [f": {entry['what']}: {entry['why']}" for entry in self.run.skipped[-1:]]
            raise UsageError("there is nothing to run" + "".join(why))
        last = QUICK_LAST_SECONDS
        if self.options.only_a_folder():
            last = FOLDER_LAST_SECONDS
        threads = torch.get_num_threads()
        try:
            with self._progress(len(steps) + 1) as advance:
                advance("limits of this machine")
                self.measure_limits()
                for i, step in enumerate(steps):
                    advance(step.title)
                    if self._hurried() and time.monotonic() - start > last:
                        self.run.skip(step.title, "the time of --quick was over")
                        continue
                    seconds = self._share(start, steps[i:])
                    rows = step.measure(seconds, None)
                    self.run.rows.extend(rows)
                    self._tell(step, rows)
        except KeyboardInterrupt:
            self.run.notes.append("interrupted: what was measured so far is here")
        finally:
            torch.set_num_threads(threads)
        self.run.seconds = time.monotonic() - start
        return self.run

    def _share(self, start: float, left: list[Step]) -> float:
        """A step's budget, cut in proportion when the quick run is behind its schedule."""
        wanted = left[0].seconds
        if not self._hurried():
            return wanted
        whole = FOLDER_SECONDS if self.options.only_a_folder() else QUICK_SECONDS
        remaining = whole - (time.monotonic() - start)
        return max(0.2, wanted * min(1.0, remaining / sum(step.seconds for step in left)))

    def _hurried(self) -> bool:
        """Whether this is the quick run that has to keep to its time."""
        options = self.options
        return options.suite == "quick" and not options.budget_s and not options.sizes

    @contextmanager
    def _progress(self, total: int):
        if not self.console.is_terminal:
            yield lambda title: None
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=total, completed=-1)

            def advance(title: str) -> None:
                progress.update(task, advance=1, description=title)

            yield advance

    def _tell(self, step: Step, rows: list[Row]) -> None:
        parts = []
        for row in rows:
            ratio = (
                f" {row.ratio:.2f}x"
                if row.ratio is not None and row.ratio_to != row.provider
                else ""
            )
            parts.append(f"{row.provider} {report.seconds(row.median_s)}{ratio} {row.mark}")
        self.console.print(f"{step.title}: {' | '.join(parts)}", highlight=False)
