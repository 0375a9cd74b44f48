"""One run from plan to rows: groups in order, each with its share of the time that is left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import limits, machine, memory, ops, providers, report
from .models import generate
from .ops import attention, generic
from .ops.attention_case import DTYPES
from .options import Options
from .rows import Row, Run

QUICK_SECONDS = 170.0
QUICK_LAST_SECONDS = 205.0
GROUP_SECONDS = {"quick": 2.5, "full": 8.0, "musts": 8.0}
MODEL_SECONDS = {"quick": 5.0, "full": 15.0, "musts": 15.0}


@dataclass
class Step:
    """A group of rows timed against each other; ``seconds`` is what it may take."""

    title: str
    seconds: float
    measure: Callable[[float, Callable], list[Row]]


class Session:
    def __init__(self, options: Options, console: Console):
        self.options, self.console = options, console
        self.device = torch.device(options.device)
        self.run = Run(
            options.command, datetime.now(UTC).isoformat(timespec="seconds"), machine.describe()
        )
        self.run.notes.extend(options.notes)
        self.providers = self._usable_providers()
        self._models: dict[str, object] = {}
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
            else:
                self.run.skip(provider.LABEL, why)
        return usable

    def cases(self, module: ModuleType) -> list:
        options = self.options
        if options.sizes:
            if not hasattr(module, "sized_cases"):
                self.run.skip(module.__name__.rsplit(".", 1)[-1], "it has no --seqlen")
                return []
            shape = (options.batch, options.heads, options.head_dim)
            return module.sized_cases(options.dtypes, options.sizes, *shape)
        if options.suite == "full" and hasattr(module, "full_cases"):
            return module.full_cases(options.dtypes)
        return module.quick_cases(options.dtypes)

    def plan(self) -> list[Step]:
        steps = []
        for name in self.options.ops:
            module = ops.find(name)
            for case in self.cases(module):
                steps += self._op_steps(module, case)
        if "bert" in self.options.models:
            steps += self._model_steps()
        for name in self.options.models:
            if name in generate.MODELS:
                steps += self._generate_steps(name)
            elif name != "bert":
                steps += self._family_steps(name)
        return steps

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
                if self.options.memory and source is attention:
                    for row in rows:
                        row.peak_bytes = memory.peak(
                            case, direction, row.provider, threads, str(self.device)
                        )
                return rows

            title = f"{case.name} {case.dtype} {direction}, {threads} thr."
            steps.append(Step(title, budget, measure))
        return steps

    def _model_steps(self) -> list[Step]:
        seconds = self.options.budget_s or MODEL_SECONDS[self.options.suite]
        every = self._model_threads()
        dtypes, first = self.options.dtypes, self.options.threads
        jobs = [(d, i, "forward", t) for i in (1, 0) for d in dtypes for t in first]
        jobs += [(dtype, 1, "step", first[0]) for dtype in dtypes]
        jobs += [(d, 0, "forward", t) for d in dtypes for t in every if t not in first]
        steps = []
        for dtype, batch, direction, threads in jobs:

            def measure(
                seconds, on_round, dtype=dtype, batch=batch, direction=direction, threads=threads
            ):
                torch.set_num_threads(threads)
                bench = self._bert(dtype)
                if bench is None:
                    return []
                name = list(bench.source.batches)[batch]
                return bench.measure(name, direction, threads, seconds, on_round)

            text = ("sentences", "paragraphs")[batch]
            title = f"BERT on {text} {dtype} {direction}, {threads} thr."
            steps.append(Step(title, seconds, measure))
        return steps

    def _family_steps(self, name: str) -> list[Step]:
        """One family, or a folder; its models of one dtype live until the next dtype's."""
        try:
            from .models import families

            known = name in families.FAMILIES
            source = families.family(name) if known else families.folder(name)
        except (ImportError, ValueError) as why:
            self.run.skip(name, str(why))
            return []
        options, holder = self.options, {}
        seconds = options.budget_s or MODEL_SECONDS[options.suite]
        compiled = options.suite == "full" or "torch_compile" in options.providers
        peers = {n: p for n, p in self.providers.items() if hasattr(p, "model_forward")}
        if options.suite != "full":
            peers = {n: p for n, p in peers.items() if n in options.providers}
        steps = []
        for dtype in options.dtypes:
            for direction, sizes in source.batches.items():
                if not options.default_directions and direction not in options.directions:
                    continue
                for size in sizes:

                    def measure(seconds, on_round, dtype=dtype, direction=direction, size=size):
                        torch.set_num_threads(options.threads[0])
                        if dtype not in holder:
                            holder.clear()
                            holder[dtype] = families.Bench(
                                source, dtype, self.device, self.run, compiled, peers
                            )
                        return holder[dtype].measure(
                            direction, size, options.threads[0], seconds, on_round
                        )

                    title = f"{source.title} {dtype} {direction} {size[0]} x {size[1]}"
                    steps.append(Step(title, seconds, measure))
        return steps

    def _generate_steps(self, name: str) -> list[Step]:
        """A model that generates; those of one dtype live until the next dtype's."""
        options, holder = self.options, {}
        seconds = options.budget_s or MODEL_SECONDS[options.suite]
        steps = []
        for dtype in options.dtypes:
            for batch in generate.BATCHES:
                for threads in self._model_threads():

                    def measure(seconds, on_round, dtype=dtype, batch=batch, threads=threads):
                        torch.set_num_threads(threads)
                        if dtype not in holder:
                            holder.clear()
                            holder[dtype] = generate.Bench(name, dtype, self.device, self.run)
                        return holder[dtype].measure(batch, threads, seconds, on_round)

                    title = f"{name} {dtype}, {batch} a batch, {threads} thr."
                    steps.append(Step(title, seconds, measure))
        return steps

    def _model_threads(self) -> tuple[int, ...]:
        """The thread counts asked for; if none were, also all cores, as a user would run it."""
        chosen = self.options.threads
        if self.options.default_threads:
            chosen = tuple(dict.fromkeys((*chosen, len(os.sched_getaffinity(0)))))
        return chosen

    def _bert(self, dtype: str):
        """The models of one dtype, kept for its next rows."""
        if dtype not in self._models:
            try:
                from .models import bert

                source = self._models.get("source") or bert.load(self.device)
                self._models["source"] = source
                self._models[dtype] = bert.Bench(source, dtype, self.device, self.run)
            except ImportError as missing:
                self.run.skip("BERT", str(missing))
                self._models[dtype] = None
        return self._models[dtype]

    def measure_limits(self) -> None:
        wanted = set(self.options.threads)
        if self.options.models and self.device.type == "cpu":
            wanted.update(self._model_threads())
        for threads in sorted(wanted):
            torch.set_num_threads(threads)
            dtypes = {name: DTYPES[name] for name in self.options.dtypes}
            self.run.limits.append(limits.measure(self.device, threads, dtypes))

    def execute(self) -> Run:
        """Runs the plan with live progress. What was measured is kept when interrupted."""
        start = time.monotonic()
        steps = self.plan()
        threads = torch.get_num_threads()
        try:
            with self._progress(len(steps) + 1) as advance:
                advance("limits of this machine")
                self.measure_limits()
                for i, step in enumerate(steps):
                    advance(step.title)
                    if self._hurried() and time.monotonic() - start > QUICK_LAST_SECONDS:
                        self.run.skip(step.title, "the four minutes of --quick were over")
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
        remaining = QUICK_SECONDS - (time.monotonic() - start)
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
