"""What an op needs to be benchmarked: its cases as ``Work``; checking and timing come from here.

    def quick_cases(dtypes): return [Work(op="softmax", case="8192x1024", dtype=d) for d in dtypes]
    def full_cases(dtypes): ...  # more of them; optional
    def must_cases(dtypes): ...  # those with goals, for --suite musts; optional

in ``benchmarks/ops/<op>.py`` is all. Attention has a harness of its own around its many features.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..gate import Error, Verdict, judge, unchecked
from ..harness import Call, clock_for, interleave
from ..rows import Row, Run, set_ratios
from .attention_case import DTYPES

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor | tuple[Tensor, ...]]
LABELS = {"fasttx": "fasttx", "eager": "PyTorch eager", "torch_compile": "torch.compile"}


@dataclass(frozen=True)
class Work:
    """One case of an op.

    make(device, generator): the inputs by name, floating ones already in the case's dtype.
    leaves: the inputs whose gradients are taken. truth(inputs): the plain formula, differentiable,
    in whatever dtype the inputs have; dropout with given bits. It runs in fp64 for the answer and
    in the case's dtype for the yardstick. contenders: what is timed, by provider name; "eager" and
    "fasttx" at least. checks: what is checked instead of a contender where they differ (known
    dropout bits); None where it cannot be checked. timed: makes the timed call of a contender for
    a direction itself, where the general way (forward without gradients, backward on a kept
    graph, step) does not fit. flops, moved: FLOPs and bytes of a call by direction; a direction
    they lack has no share.

    goals: (must, aim) ratios to ``base`` on one thread by direction, on more by (direction,
    threads). times: (must, aim) seconds a call, at most. shares: the least share of the machine's
    limit.
    """

    op: str
    case: str
    dtype: str
    make: Callable[[torch.device, torch.Generator], Inputs]
    truth: Function
    contenders: Mapping[str, Function]
    leaves: tuple[str, ...] = ()
    directions: tuple[str, ...] = ("forward", "backward")
    checks: Mapping[str, Function | None] = field(default_factory=dict)
    timed: Mapping[str, Callable[[Inputs, str], Call]] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    moved: Mapping[str, int] = field(default_factory=dict)
    goals: Mapping[object, tuple[float | None, float | None]] = field(default_factory=dict)
    times: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    base: str = "eager"
    shape: Mapping[str, int] = field(default_factory=dict)
    features: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.case

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class Problem:
    """One case on one device with its fp64 answer, shared by all directions."""

    def __init__(self, case: Work, device: torch.device, gradients: bool = True):
        self.case, self.device = case, device
        self.x = case.make(device, torch.Generator(device=device).manual_seed(0))
        for name in case.leaves:
            self.x[name].requires_grad_()
        self.gradients = gradients and bool(case.leaves)
        exact = {name: _as(t, torch.float64, name in case.leaves) for name, t in self.x.items()}
        outputs = case.truth(exact)
        self.upstream = _upstream(outputs, case.torch_dtype)
        self.answer = self._results(case.truth, exact, outputs)
        self.plain = {
            name: Error.between(t, self.answer[name])
            for name, t in self._results(case.truth, self.x).items()
        }
        self._verdicts: dict[str, Verdict] = {}

    def _results(self, function: Function, x: Inputs, outputs=None) -> Inputs:
        outputs = _tuple(function(x) if outputs is None else outputs)
        names = ["out", *(f"out{i}" for i in range(1, len(outputs)))]
        found = {name: t.detach() for name, t in zip(names, outputs, strict=True)}
        if self.gradients:
            leaves = [x[name] for name in self.case.leaves]
            pairs = [(t, g) for t, g in zip(outputs, self.upstream, strict=True) if t.requires_grad]
            upstream = [g.to(t.dtype) for t, g in pairs]
            grads = torch.autograd.grad([t for t, _ in pairs], leaves, upstream)
            found |= {f"d{name}": g for name, g in zip(self.case.leaves, grads, strict=True)}
        return found

    def verdict(self, name: str, direction: str) -> Verdict:
        """A forward row needs right outputs, a backward or step row right gradients too."""
        if name not in self._verdicts:
            function = self.case.checks.get(name, self.case.contenders[name])
            if function is None:
                return unchecked("its random bits are its own and cannot be given")
            actual = self._results(function, self.x)
            errors = {key: Error.between(t, self.answer[key]) for key, t in actual.items()}
            self._verdicts[name] = judge(errors, self.plain, self.case.torch_dtype)
        verdict = self._verdicts[name]
        if direction != "forward":
            return verdict
        errors = {key: e for key, e in verdict.errors.items() if key.startswith("out")}
        return judge(errors, self.plain, self.case.torch_dtype)

    def timed(self, name: str, direction: str) -> Call:
        return timed_call(self.case, self.x, self.upstream, name, direction)


def timed_call(work: Work, x: Inputs, given: list[Tensor] | None, name: str, direction: str):
    """What is timed of a contender; `given`: the gradients of the outputs."""
    if name in work.timed:
        return work.timed[name](x, direction)
    function = work.contenders[name]
    leaves = [x[leaf] for leaf in work.leaves]

    def backward_of(outputs, retain):
        pairs = zip(_tuple(outputs), given, strict=True)
        pairs = [(t, g.to(t.dtype)) for t, g in pairs if t.requires_grad]
        kept, upstream = zip(*pairs, strict=True)
        return lambda: torch.autograd.grad(kept, leaves, upstream, retain_graph=retain)

    if direction == "forward":

        def forward():
            with torch.no_grad():
                return function(x)

        return forward
    if direction == "backward":
        return backward_of(function(x), True)
    return lambda: backward_of(function(x), False)()


def fresh(
    op: str, case: str, dtype: str, direction: str, provider: str, device: torch.device
) -> Callable:
    """For a fresh process (fresh.py): a case found by its name."""
    module = importlib.import_module(f".{op}", __package__)
    makers = [getattr(module, name, None) for name in ("quick_cases", "full_cases")]
    every = [one for make in makers if make is not None for one in make((dtype,))]
    work = next(one for one in every if one.case == case)
    x = work.make(device, torch.Generator(device=device).manual_seed(0))
    for name in work.leaves:
        x[name].requires_grad_()

    def prepare():
        if provider not in work.contenders:
            work.contenders[provider] = torch.compile(work.contenders["eager"], dynamic=False)
        with torch.no_grad():
            outputs = work.truth(x) if direction != "forward" else None
        upstream = None if outputs is None else _upstream(outputs, work.torch_dtype)
        return timed_call(work, x, upstream, provider, direction), None

    return prepare


def _as(t: Tensor, dtype: torch.dtype, leaf: bool) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.detach().to(dtype).requires_grad_(leaf)


def _tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _upstream(outputs, dtype: torch.dtype) -> list[Tensor]:
    """A standard normal gradient for every output, as the case's dtype rounds it."""
    made = []
    for t in _tuple(outputs):
        generator = torch.Generator(device=t.device).manual_seed(1)
        made.append(torch.randn(t.shape, generator=generator, device=t.device).to(dtype))
    return made


def _op_of(provider, case: Work) -> Function | None:
    return provider.op(case) if hasattr(provider, "op") else None


def measure(
    problem: Problem,
    direction: str,
    providers: Mapping[str, object],
    threads: int,
    budget_s: float,
    run: Run,
    everything: bool = False,
    on_round=None,
) -> list[Row]:
    """Gates, then times the contenders. ``everything`` adds torch.compile of the eager one."""
    case, device = problem.case, problem.device
    contenders = dict(case.contenders)
    compiles = everything and "torch_compile" in providers and "eager" in contenders
    if compiles and "torch_compile" not in contenders:
        torch._functorch.config.donated_buffer = False
        # Past a number of versions of one function the next ones would run uncompiled.
        torch._dynamo.reset()
        compiled = torch.compile(contenders["eager"], dynamic=False)
        contenders["torch_compile"] = problem.case.contenders["torch_compile"] = compiled
        problem.case.checks.setdefault("torch_compile", case.checks.get("eager", compiled))
    for name, provider in providers.items():
        if name not in contenders and (function := _op_of(provider, case)) is not None:
            contenders[name] = problem.case.contenders[name] = function
    ours = providers.get("fasttx")
    if ours is None or ours.reason() is not None:
        contenders.pop("fasttx", None)
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    prepared: dict[str, float] = {}
    for name in contenders:
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                verdict = problem.verdict(name, direction)
                calls[name] = problem.timed(name, direction)
        except NotImplementedError as why:
            run.skip(f"{name}: {case.op} {case.case} {case.dtype} {direction}", str(why))
            continue
        if getattr(providers.get(name), "COMPILES", False):
            prepared[name] = time.perf_counter() - start
        row = Row(
            "op", case.op, f"{case.op} {case.case}", direction, name,
            LABELS.get(name) or providers[name].LABEL,
            case.dtype, str(device), threads, "", dict(case.shape), dict(case.features),
        )  # fmt: skip
        row.set_verdict(verdict)
        rows.append(row)
    timings = interleave(calls, clock_for(device, threads), budget_s, on_round=on_round)
    limits = run.limits_for(str(device), threads)
    for row in rows:
        row.clock = timings[row.provider].clock
        row.set_timing(timings[row.provider], prepared.get(row.provider))
        row.set_rate(case.flops.get(direction), limits, case.moved.get(direction))
    set_ratios(rows, timings, case.base)
    return rows
