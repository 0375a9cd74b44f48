"""What a call of a public function would run, and why not the other kernels."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .choice import chosen
from .op import Op, captured


@dataclass(frozen=True)
class Explanation:
    """What a call would run. rows: (op, backend, reason to refuse or None, chosen). measured: op ->
    the measurement that put a kernel first."""

    rows: tuple[tuple[str, str, str | None, bool], ...]
    measured: Mapping[str, str] = field(default_factory=dict)

    def chosen(self, op: str) -> str | None:
        return next((b for o, b, _, c in self.rows if o == op and c), None)

    def told(self, op: str, why: str | None, chosen: bool) -> str:
        """A row's last column."""
        return why or (self.measured.get(op, "runs") if chosen else "supports it")

    def __str__(self) -> str:
        return "\n".join(
            f"{'->' if c else '  '} {op:16} {backend:10} {self.told(op, why, c)}"
            for op, backend, why, c in self.rows
        )


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Say which kernel a call of a public function would run, forward and backward, and why not the
    others. Runs nothing.

    >>> print(fasttx.explain(fasttx.attention, q, k, v, is_causal=True))
    """
    calls: list = []
    token = captured.set(calls)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:

            def fake(x):
                if not isinstance(x, torch.Tensor):
                    return x
                return mode.from_tensor(x.detach().requires_grad_(x.requires_grad))

            function(*map(fake, args), **{k: fake(v) for k, v in kwargs.items()})
    finally:
        captured.reset(token)
    rows, measured = [], {}
    for op, call, backend in calls:
        paired = [] if op.backward is None else [(op.backward, _backward_call(op, call))]
        for each, values in [(op, call), *paired]:
            found = False
            best = chosen(each.name, values, each.at)
            for kernel, why in each.refusals(values):
                why = why or (
                    "only when asked for by name" if kernel.needs.by_name and not backend else None
                )
                why = (
                    f"backend={backend!r} was asked for"
                    if backend and kernel.backend != backend
                    else why
                )
                rows.append((each.name, kernel.backend, why, why is None and not found))
                if why is None and not found:
                    found = True
                    if best is not None and best.backend == kernel.backend:
                        measured[each.name] = best.of
    return Explanation(tuple(rows), measured)


def _backward_call(op: Op, call: tuple) -> tuple:
    """The arguments of the backward of a call; of what the forward has not, upstream gradients and
    residuals, what may be absent is, and the rest is like its first tensor."""
    named = dict(zip(op.at, call, strict=False))
    return tuple(
        named.get(a.name, None if isinstance(a.type, torch.OptionalType) else call[0])
        for a in op.backward.overload._schema.arguments
    )


GPU_RUNS = Path(__file__).with_name("gpu_runs.json")


@functools.cache
def gpu_runs() -> dict[str, dict[str, dict[str, str]]]:
    """op -> backend -> card, date and commit of the last run in which all its tests passed."""
    return json.loads(GPU_RUNS.read_text())


def last_gpu_run(op: str, backend: str) -> str:
    found = gpu_runs().get(op, {}).get(backend)
    return "never" if found is None else f"{found['date']}, {found['card']}, {found['commit']}"
