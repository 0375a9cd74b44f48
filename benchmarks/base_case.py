"""A process of ``--base``, which has one of the two commits of fasttx (base.py).

What is imported here, it may be an old one; so only what a case needs, and nothing new of fasttx's.
"""

from __future__ import annotations

import gc
import importlib
import warnings
from dataclasses import asdict
from typing import Any

import torch

from . import ops, providers
from .contest import Group
from .harness import Call
from .ops import attention, generic
from .rows import Run

Told = dict[str, Any]


def prepare(threads: int, device: str, options: dict) -> dict:
    """For apart.py: `open` gets a case ready, `checked` tells what it is, who of fasttx's takes
    part and how right they are; `take` chooses one of them, `call` runs it. options: which cases
    of an op, for ops.cases."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", RuntimeWarning)
    ready: dict[str, Any] = {}

    def open(kind: str, **about: Any) -> None:
        ready.clear()
        gc.collect()
        if kind == "op":
            ready["case"] = OpCase(torch.device(device), options, **about)
        else:
            ready["case"] = ModelCase(torch.device(device), threads, kind, **about)

    def take(provider: str) -> None:
        ready["call"] = None
        gc.collect()
        ready["call"] = ready["case"].call(provider)

    def call() -> None:
        ready["call"]()

    return {"open": open, "checked": lambda: ready["case"].checked(), "take": take, "call": call}


class OpCase:
    """A case of an op; ValueError where it is another one here."""

    def __init__(
        self, device: torch.device, options: dict, op: str, index: int, name: str, direction: str
    ):
        module = ops.find(op)
        cases = ops.cases(module, **options)
        case = cases[index] if index < len(cases) else None
        if case is None or f"{case.name} {case.dtype}" != name:
            raise ValueError(f"case {index} of {op} is not {name}")
        source = module if hasattr(module, "Problem") else generic
        self.case, self.attention = case, source is attention
        self.op, self.direction = op, direction
        self.problem = source.Problem(case, device, direction != "forward")

    def checked(self) -> Told:
        case, direction = self.case, self.direction
        if self.attention:
            judged = self.problem.verdict(providers.find()["fasttx"], direction)
            facts = case.shape(), case.feature_facts(), case.flops(direction), None
        else:
            judged = self.problem.verdict("fasttx", direction)
            facts = dict(case.shape), dict(case.features)
            facts += case.flops.get(direction), case.moved.get(direction)
        group = Group("op", self.op, case.name, direction, case.dtype, "base", *facts)
        ours = {"fasttx": {"label": "", "verdict": asdict(judged)}}
        return {"group": asdict(group), "ours": ours, "left_out": []}

    def call(self, provider: str) -> Call:
        problem = self.problem
        if not self.attention:
            return problem.timed(provider, self.direction)
        ours = providers.find()[provider]
        call, leaves = ours.attention(self.case, problem.x, check=False)
        return attention.timed_call(call, leaves, problem.x.dout, self.direction)


class ModelCase:
    """A case of a module of models/ (contest.Case): checked by its Bench, timed by its `fresh`."""

    def __init__(self, device: torch.device, threads: int, module: str, made: Told, given: Told):
        self.device, self.threads = device, threads
        self.module = importlib.import_module(f".models.{module}", __package__)
        self.made, self.given = _tuples(made), _tuples(given)

    def checked(self) -> Told:
        run = Run("", "", {})
        bench = self.module.Bench(**self.made, device=self.device, run=run)
        group, contenders = bench.contest(self.threads, **self.given)
        ours = {
            name: {"label": contender.label, "verdict": asdict(contender.verdict)}
            for name, contender in contenders.items()
            if name.startswith("fasttx")
        }
        left_out = [entry["why"] for entry in run.skipped]
        return {"group": asdict(group), "ours": ours, "left_out": left_out}

    def call(self, provider: str) -> Call:
        prepare = self.module.fresh(
            **self.made, **self.given, provider=provider, device=self.device
        )
        return prepare()[0]


def _tuples(values: Told) -> Told:
    """JSON has made lists of them."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
