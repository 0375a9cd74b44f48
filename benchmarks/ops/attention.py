"""Attention: the cases, and one case measured with every provider in one direction."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from .. import providers
from ..gate import Verdict, judge, unchecked
from ..harness import Call, Timing, clock_for, interleave
from ..providers import Skip, sdpa
from ..rows import Row, Run, set_ratios
from .attention_case import Case, Tensors, tensors
from .attention_check import Answer, answer

BASE = "sdpa"
EAGER_MAX_BYTES = 2 << 30
COMPILE_HELPS = (
    "shown where SDPA has no fused kernel (the backward of a trainable bias); --full: everywhere"
)


def quick_cases(dtypes: tuple[str, ...]) -> list[Case]:
    """Encoder, decoder and seq2seq shapes of base-size models, small enough for four minutes."""
    shapes = [
        Case("encoder", 8, 12, 128, 128, 64, "", padding=0.25),
        Case("encoder", 2, 12, 512, 512, 64, ""),
        Case("decoder", 1, 12, 512, 512, 64, "", causal=True),
        Case("decoder", 1, 8, 1024, 1024, 128, "", causal=True, kv_heads=2),
        Case("seq2seq cross", 4, 8, 128, 512, 64, "", padding=0.25),
        Case("seq2seq self", 2, 8, 512, 512, 64, "", bias="relative"),
    ]
    return [replace(case, dtype=dtype) for case in shapes for dtype in dtypes]


def full_cases(dtypes: tuple[str, ...]) -> list[Case]:
    """The quick cases, longer ones, and the features one at a time."""
    shapes = [replace(case, dtype="") for case in quick_cases(("fp32",))]
    shapes += [
        Case("encoder", 8, 12, 512, 512, 64, "", padding=0.25),
        Case("encoder", 4, 12, 512, 512, 64, "", dropout=0.1),
        Case("encoder", 1, 12, 2048, 2048, 64, ""),
        Case("decoder", 4, 12, 512, 512, 64, "", causal=True, dropout=0.1),
        Case("decoder", 1, 12, 2048, 2048, 64, "", causal=True),
        Case("decoder", 1, 16, 1024, 1024, 64, "", causal=True, bias="alibi"),
        Case("decoder", 1, 8, 4096, 4096, 128, "", causal=True),
        Case("seq2seq cross", 2, 16, 128, 1024, 64, ""),
        Case("seq2seq self", 4, 8, 512, 512, 64, "", bias="relative", padding=0.25),
    ]
    return [replace(case, dtype=dtype) for case in shapes for dtype in dtypes]


def sized_cases(
    dtypes: tuple[str, ...], sizes: tuple[int, ...], batch: int, heads: int, head_dim: int
) -> list[Case]:
    """Full and causal self-attention at sizes the user asked for."""
    return [
        Case(topology, batch, heads, size, size, head_dim, dtype, causal=causal)
        for size in sizes
        for topology, causal in (("encoder", False), ("decoder", True))
        for dtype in dtypes
    ]


class Problem:
    """One case on one device, its fp64 answer computed once and shared by all directions."""

    def __init__(self, case: Case, device: torch.device, gradients: bool = True):
        self.case, self.device = case, device
        self.x: Tensors = tensors(case, device)
        if case.dropout:
            self.x.keep = keep_bits(case, self.x)
        self.gradients = gradients
        self.answer: Answer = answer(case, self.x, gradients)
        self._admit_sdpa()
        self._verdicts: dict[str, Verdict] = {}

    def _admit_sdpa(self) -> None:
        """The largest single error fluctuates, so its yardstick is the worse of eager and SDPA."""
        try:
            call, leaves = sdpa.attention(self.case, self.x, check=True)
        except Skip:
            return
        found = self.answer.errors(results(call, leaves, self.x.dout, self.gradients))
        for name, error in found.items():
            plain = self.answer.plain[name]
            largest = max(plain.largest, error.largest)
            self.answer.plain[name] = replace(plain, largest=largest)

    def verdict(self, provider: ModuleType, direction: str) -> Verdict:
        if provider.NAME not in self._verdicts:
            self._verdicts[provider.NAME] = self._judge(provider)
        verdict = self._verdicts[provider.NAME]
        return verdict if direction != "forward" else self._forward_only(verdict)

    def _judge(self, provider: ModuleType) -> Verdict:
        forward_only = self.x.q.device.type in getattr(provider, "NO_BACKWARD", ())
        gradients = self.gradients and not forward_only
        try:
            call, leaves = provider.attention(self.case, self.x, check=True)
            with torch.set_grad_enabled(gradients):
                actual = results(call, leaves, self.x.dout, gradients)
        except Skip as skip:
            return unchecked(str(skip))
        return self.answer.judge(actual)

    def _forward_only(self, verdict: Verdict) -> Verdict:
        if verdict.ok is None:
            return verdict
        errors = {"out": verdict.errors["out"]}
        plain = {"out": self.answer.plain["out"]}
        return judge(errors, plain, self.case.torch_dtype)


def keep_bits(case: Case, x: Tensors) -> Tensor | None:
    """The dropout decisions fasttx documents for a seed: a pure function of position."""
    try:
        philox = importlib.import_module("fasttx.reference.philox")
    except ImportError:
        return None
    seed = torch.tensor([x.seed], device=x.q.device)
    return philox.philox_mask(seed, case.dropout, case.batch, case.heads, case.queries, case.keys)


def results(
    call: Callable[[], Tensor], leaves: dict[str, Tensor], dout: Tensor, gradients: bool
) -> dict[str, Tensor]:
    """out and the gradients of q, k, v and table, detached."""
    out = call()
    found = {"out": out.detach()}
    if gradients:
        names = [name for name in leaves if name != "mask"]
        grads = torch.autograd.grad(out, [leaves[name] for name in names], dout)
        found |= {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    return found


def timed_call(
    call: Callable[[], Tensor], leaves: dict[str, Tensor], dout: Tensor, direction: str
) -> Call:
    """forward without gradients, backward alone on a kept graph, or step: both, as in training."""
    inputs = list(leaves.values())
    if direction == "forward":

        def forward():
            with torch.no_grad():
                return call()

        return forward
    if direction == "backward":
        out = call()
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
    return lambda: torch.autograd.grad(call(), inputs, dout)


def fresh(case: dict, direction: str, provider: str, device: torch.device) -> Callable:
    """For a fresh process (fresh.py); the smaller case has one row of 64 queries and keys."""
    whole = Case(**case)
    chosen = providers.find()[provider]
    made = {c: tensors(c, device) for c in (whole, replace(whole, batch=1, queries=64, keys=64))}

    def prepare():
        calls = []
        for one, x in made.items():
            call, leaves = chosen.attention(one, x, False)
            calls.append(timed_call(call, leaves, x.dout, direction))
        return calls

    return prepare


def refusal(
    provider: ModuleType, case: Case, direction: str, device: torch.device, everything: bool
) -> str | None:
    """Why a provider sits this case out, or None."""
    if provider.NAME == "eager":
        probabilities = case.batch * case.heads * case.queries * case.keys
        size = probabilities * case.torch_dtype.itemsize * (2 if direction == "forward" else 5)
        if size > EAGER_MAX_BYTES:
            return f"its N x N probabilities would need {size / 2**30:.1f} GiB"
    if getattr(provider, "EXTRA", False) and not everything:
        return "with --full, or by name"
    if direction != "forward" and device.type in getattr(provider, "NO_BACKWARD", ()):
        return f"it has no backward on {device.type}"
    helped = case.bias == "relative" and direction == "backward"
    if provider.NAME == "torch_compile" and not everything and not helped:
        return COMPILE_HELPS
    return None


def measure(
    problem: Problem,
    direction: str,
    contenders: dict[str, ModuleType],
    threads: int,
    budget_s: float,
    run: Run,
    everything: bool = False,
    on_round=None,
) -> list[Row]:
    """Gates, then times all providers of one case and direction against each other."""
    case, device = problem.case, problem.device
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    for name, provider in contenders.items():
        if not hasattr(provider, "attention"):
            continue
        why = refusal(provider, case, direction, device, everything)
        if why is not None:
            run.skip(
                f"{provider.LABEL}: {case.name}" if "need" in why else provider.LABEL,
                why,
            )
            continue
        try:
            call, leaves = provider.attention(case, problem.x, check=False)
            verdict = problem.verdict(provider, direction)
            calls[name] = timed_call(call, leaves, problem.x.dout, direction)
        except Skip as skip:
            run.skip(f"{provider.LABEL}: {case.name} {case.dtype} {direction}", str(skip))
            continue
        row = Row(
            "op", "attention", case.name, direction, name, provider.LABEL, case.dtype,
            str(device), threads, "", case.shape(), case.feature_facts(),
        )  # fmt: skip
        row.set_verdict(verdict)
        if problem.answer.sampled:
            row.notes.append(f"checked on {len(problem.answer.groups)} of its heads")
        if hasattr(provider, "backend_of"):
            row.backend = provider.backend_of(case, problem.x)
        rows.append(row)
    timings = interleave(calls, clock_for(device, threads), budget_s, on_round=on_round)
    return finish(rows, timings, case.flops(direction), contenders, run)


def finish(
    rows: list[Row],
    timings: dict[str, Timing],
    flops: int,
    contenders: dict[str, ModuleType],
    run: Run,
) -> list[Row]:
    for row in rows:
        timing = timings[row.provider]
        row.clock = timing.clock
        row.set_timing(timing, 0.0 if contenders[row.provider].COMPILES else None)
        row.set_rate(flops, run.limits_for(row.device, row.threads))
    set_ratios(rows, timings, BASE)
    return rows
