"""``fasttx tune``: which kernel is the fastest on this machine, for each op and shape class.

The cases of the grid of ``never-slower`` are run once each, forward and training step; every call
of an inner op on the way is then timed with each backend that may run it by itself, and with
PyTorch's own operations where they are a backend ("torch"). All take turns (harness.py). A class
gets an entry only where every case of it gained at least 3 % at the lower end of the 95 % interval
against the kernel that is first without a measurement, in two looks, and the outputs agree.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fasttx
from fasttx import choice, choice_tables
from fasttx.op import OPS, Kernel, Op

from . import grid, machine, providers, shape_classes
from .gate import AGREE
from .harness import Timing, clock_for, interleave
from .ops import generic
from .ops.attention_case import Case, tensors
from .stats import Interval

SCHEMA = "fasttx-tune/1"
ROUNDS = (7, 15)  # of the first look, and of the second
WORTH_TIMING = 1.5  # a backend this much slower than the best at first sight is not timed
QUICK_FLOPS, QUICK_BYTES = 2e9, 1 << 25


@dataclass
class Race:
    """One call: median seconds by backend, the best, and its gain over the first."""

    case: str
    first: str
    seconds: dict[str, float]
    best: str
    gain: Interval | None
    why: str = ""


# By inner op, by class.
Races = dict[str, dict[str, list[Race]]]


@dataclass
class Options:
    ops: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    threads: tuple[int, ...] = (1,)
    device: str = "cpu"
    quick: bool = False
    dry_run: bool = False
    output: Path | None = None
    json: Path | None = None
    cases: Any = field(default=None, repr=False)


def execute(options: Options, console: Console) -> list[dict]:
    """Measures, writes the tables, and returns them."""
    names = options.ops or grid.names()
    for name in names:
        if name not in grid.names():
            raise ValueError(f"unknown op {name!r}: {', '.join(grid.names())}")
    device, before = torch.device(options.device), torch.get_num_threads()
    measured, races = [], []
    try:
        for threads in options.threads if device.type == "cpu" else (0,):
            if threads:
                torch.set_num_threads(threads)
            table = _table(device, threads)
            measured.append(table)
            for name in names:
                found: Races = {}
                try:
                    _measure_op(name, options, device, threads or 1, console, found)
                finally:
                    races += _told(found, threads)
                table["ops"] |= {op: entries(classes) for op, classes in found.items()}
    except KeyboardInterrupt:
        console.print("interrupted: ops that were not finished are left out", highlight=False)
    finally:
        torch.set_num_threads(before)
    measured = [t for t in measured if t["ops"]]
    count = sum(len(e) for t in measured for e in t["ops"].values())
    console.print(f"{count} entries: calls that another kernel than the first runs faster")
    if options.json:
        report = {"schema": SCHEMA, "machine": machine.describe(), "races": races}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {options.json.resolve()}", soft_wrap=True, highlight=False)
    if not options.dry_run and measured:
        _write(measured, options.output, console)
    return measured


def _write(measured: list[dict], output: Path | None, console: Console) -> None:
    path = output or choice_tables.user_file()
    try:
        tables = (
            choice_tables.read(path.read_text())
            if output and output.exists()
            else [] if output else choice_tables.read_user(path)
        )  # fmt: skip
    except ValueError as error:
        if output:
            raise ValueError(f"{path}: {error}") from None
        tables = []
    for table in measured:
        tables = choice_tables.merged(tables, table)
    choice_tables.write(path, tables, 0o644 if output else 0o600)
    choice.forget()
    console.print(f"wrote {path.resolve()}", soft_wrap=True, highlight=False)


def _table(device: torch.device, threads: int) -> dict[str, Any]:
    return {
        "machine": choice.place(device),
        "threads": threads,
        "fasttx": fasttx.__version__,
        "torch": torch.__version__,
        "commit": machine.describe()["commit"],
        "date": datetime.now(UTC).date().isoformat(),
        "ops": {},
    }


def _told(found: Races, threads: int) -> list[dict[str, Any]]:
    return [
        {"op": op, "class": json.loads(key), "threads": threads, "case": r.case, "first": r.first,
         "seconds": r.seconds, "best": r.best,
         "gain": r.gain and [r.gain.median, r.gain.low, r.gain.high], "why": r.why}
        for op, classes in found.items() for key, races in classes.items() for r in races
    ]  # fmt: skip


def entries(classes: dict[str, list[Race]]) -> list[dict[str, Any]]:
    """A table's entries of one op."""
    found = (entry(json.loads(key), races) for key, races in classes.items())
    return [each for each in found if each is not None]


def _measure_op(
    name: str, options: Options, device, threads: int, console: Console, races: Races
) -> None:
    """Adds the races of the calls that more than one backend can run."""
    for dtype in options.dtypes:
        for case in options.cases(name, dtype) if options.cases else grid.cases(name, dtype):
            if options.quick and _large(case):
                continue
            try:
                calls = inner_calls(case, device)
            except NotImplementedError as why:
                console.print(f"left out: {name} {case.name} {dtype}: {why}", highlight=False)
                continue
            for op, args in calls:
                if len(backends := candidates(op, args)) < 2:
                    continue
                key = json.dumps(shape_classes.describe(op.name, args, op.at))
                found = races.setdefault(op.name, {}).setdefault(key, [])
                if found and (options.quick or found[-1].gain is None):
                    continue
                found.append(race(op, args, backends, device, threads, f"{case.name} {dtype}"))
                _tell(console, op.name, json.loads(key), found[-1])
            del calls
            gc.collect()
    if not races:
        console.print(f"{name}: one kernel runs it on {device.type}, nothing to choose")


def _large(case) -> bool:
    if isinstance(case, Case):
        return case.flops("forward") > QUICK_FLOPS
    flops, moved = max(case.flops.values(), default=0), max(case.moved.values(), default=0)
    return flops > QUICK_FLOPS or moved > QUICK_BYTES


class _Calls(TorchDispatchMode):
    """The calls of fasttx's inner ops, with their arguments."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[Op, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fasttx":
            op = OPS[func._schema.name.rpartition("::")[2]]
            if op.name in shape_classes.CLASSES:
                detached = (a.detach() if isinstance(a, Tensor) else a for a in args)
                self.found.append((op, tuple(detached)))
        return func(*args, **(kwargs or {}))


def inner_calls(case, device: torch.device) -> list[tuple[Op, tuple]]:
    """What a forward without gradients and a training step of a case call, each class once."""
    if isinstance(case, Case):
        x = tensors(case, device)
        call, leaves = providers.find()["fasttx"].attention(case, x, check=False)
        leaves = list(leaves.values())
    else:
        x = case.make(device, torch.Generator(device=device).manual_seed(0))
        leaves = [x[name].requires_grad_() for name in case.leaves]

        def call():
            return case.contenders["fasttx"](x)

    with _Calls() as calls:
        with torch.no_grad():
            call()
        if leaves:
            outputs = [t for t in generic._tuple(call()) if t is not None and t.requires_grad]
            upstream = [torch.randn_like(t) for t in outputs]
            torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    once = {}
    for op, args in calls.found:
        key = json.dumps(shape_classes.describe(op.name, args, op.at))
        once.setdefault((op.name, key), (op, args))
    return list(once.values())


def candidates(op: Op, args: tuple) -> list[str]:
    """The backends that run this call by themselves, in the table's order, and "torch"."""

    def may(kernel: Kernel) -> bool:
        known = kernel.backend in choice_tables.BACKENDS
        by_itself = not kernel.needs.by_name or kernel.backend == "torch"
        return known and by_itself and kernel.refuse(args, op.at) is None

    return [k.backend for k in op.tables.get(args[0].device.type, ()) if may(k)]


def race(op: Op, args: tuple, backends: list[str], device, threads: int, case: str) -> Race:
    """Times the backends against each other on one call."""
    clock, first = clock_for(device, threads), backends[0]

    def call_of(backend: str):
        def call():
            return op(*args, backend=backend)

        return call

    calls = {b: call_of(b) for b in backends}
    seconds, wrong = {}, ""
    expected = _outputs(op, args, calls[first])
    for backend, call in calls.items():
        if backend != first and not agree(_outputs(op, args, call), expected):
            wrong = f"{backend} does not agree with {first}"
            continue
        seconds[backend] = min(clock.measure(call, 1)[0] for _ in range(2))
    close = {b: t for b, t in seconds.items() if t < WORTH_TIMING * min(seconds.values())}
    contest = {b: calls[b] for b in dict.fromkeys((first, *close))}
    if len(contest) < 2:
        return Race(case, first, seconds, first, None, wrong)
    gain = None
    for rounds in ROUNDS:
        timings: dict[str, Timing] = interleave(contest, clock, 0.0, min_rounds=rounds)
        seconds |= {b: t.interval.median for b, t in timings.items()}
        best = min(contest, key=seconds.get)
        gain = None if best == first else timings[best].ratio_to(timings[first])
        if gain is None or not gain.is_95 or gain.low < choice_tables.LEAST_GAIN:
            return Race(case, first, seconds, first, None, wrong)
    return Race(case, first, seconds, best, gain, wrong)


def _outputs(op: Op, args: tuple, call) -> list[Tensor]:
    found = generic._tuple(call())
    given = [args[op.at[name]] for name in op.mutates]
    return [t.clone() for t in (*found, *given) if isinstance(t, Tensor) and t.numel()]


def agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Relative RMS difference of every output within what its dtype allows; the same infinities."""

    def close(a: Tensor, b: Tensor) -> bool:
        if not a.is_floating_point():
            return bool(torch.equal(a, b))
        same = a == b
        d = torch.where(same, 0, a.float() - b.float()).square().mean().sqrt()
        size = torch.where(b.isfinite(), b.float(), 0).square().mean().sqrt()
        return bool(d <= AGREE[b.dtype] * size + 1e-6)

    return len(ours) == len(theirs) and all(map(close, ours, theirs))


def entry(of: dict[str, Any], races: list[Race]) -> dict[str, Any] | None:
    """The entry of a class: None unless the same backend won in every case of it."""
    if any(r.gain is None or r.best != races[0].best for r in races):
        return None
    least = min(races, key=lambda r: r.gain.low)
    return of | {
        "backend": races[0].best,
        "ms": {b: _rounded(1e3 * s) for b, s in least.seconds.items()},
        "gain": [_rounded(x) for x in (least.gain.median, least.gain.low, least.gain.high)],
        "cases": [r.case for r in races],
    }


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def _tell(console: Console, op: str, of: dict, r: Race) -> None:
    times = ", ".join(f"{b} {1e6 * s:.4g} us" for b, s in r.seconds.items())
    gained = f" {r.gain.median:.2f}x [{r.gain.low:.2f}, {r.gain.high:.2f}]" if r.gain else ""
    why = f" ({r.why})" if r.why else ""
    console.print(
        f"{r.best}{gained}: {op} {shape_classes.words(of)}: {times}{why}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
