"""What a call of a public function would run, and why not the other kernels."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .choice import chosen
from .op import OPS, Needs, captured


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
        named = dict(zip(op.at, call, strict=False))
        paired = (
            []
            if op.backward is None
            else [(op.backward, tuple(named.get(n, call[0]) for n in op.backward.at))]
        )
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


GPU_RUNS = Path(__file__).with_name("gpu_runs.json")


@functools.cache
def gpu_runs() -> dict[str, dict[str, dict[str, str]]]:
    """op -> backend -> card, date and commit of the last run in which all its tests passed."""
    return json.loads(GPU_RUNS.read_text())


def last_gpu_run(op: str, backend: str) -> str:
    found = gpu_runs().get(op, {}).get(backend)
    return "never" if found is None else f"{found['date']}, {found['card']}, {found['commit']}"


def support_table() -> str:
    """Markdown: op, device, backend, direction, dtypes, from the data that picks kernels, and when
    a GPU's kernels last ran on one."""
    directions: dict[tuple, list[str]] = {}
    for op in OPS.values():
        suffix = op.name.removeprefix(op.public + "_")
        direction = {"fwd": "forward", "bwd": "backward", "inplace": "in place"}.get(suffix, suffix)
        for device, table in op.tables.items():
            for kernel in table:
                row = (op.public, device, kernel.backend, *_summary(kernel.needs))
                directions.setdefault(row, []).append(direction)
    lines = [
        "| op | device | backend | direction | dtypes | limits | last run on a GPU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (*names, dtypes, limits), both in sorted(directions.items(), key=lambda row: row[0][:2]):
        op, device, backend = names
        ran = last_gpu_run(op, backend) if device == "cuda" and backend != "reference" else ""
        lines.append("| " + " | ".join((*names, ", ".join(both), dtypes, limits, ran)) + " |")
    return "\n".join(lines)


def _summary(needs: Needs) -> tuple[str, str]:
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in needs.dtypes or ()) or "any floating"
    limits = []
    for key, (low, high) in needs.sizes.items():
        name, _, dim = key.partition(".")
        if high < 2**31 - 256:
            limits.append(f"{low} <= {name}.shape[{dim}] <= {high}")
        elif low:
            limits.append(f"{low} <= {name}.shape[{dim}]")
    lie = {"rows": "in rows of 16 bytes", "either": "in rows or columns of 16 bytes"}
    limits += [f"{name} {lie.get(how, f'as {how}')}" for name, how in needs.matrices.items()]
    limits += [f"no {name}" for name in needs.absent]
    limits += [f"sm_{needs.sm}"] if needs.sm else []
    limits += ["=".join(needs.env)] if needs.env else []
    limits += ["by name"] if needs.by_name else []
    return dtypes, "; ".join(limits)
