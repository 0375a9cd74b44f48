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
import os
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
    """Measures, writes the tables after each op, and returns them. ValueError, OSError before the
    first measurement where the tables could not be written."""
    names = options.ops or grid.names()
    for name in names:
        if name not in grid.names():
            raise ValueError(f"unknown op {name!r}: {', '.join(grid.names())}")
    path = None if options.dry_run else options.output or choice_tables.user_file()
    for each in filter(None, (path, options.json)):
        choice_tables.check_writable(each)
    if path:
        _kept(path, options.output is not None)
        console.print(f"each op is written to {path} when it is finished", soft_wrap=True)
    device, before = torch.device(options.device), torch.get_num_threads()
    measured, races, name = [], [], ""
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
                ops = {op: entries(classes) for op, classes in found.items()}
                table["ops"] |= ops
                if ops and path:
                    _write(table | {"ops": ops}, path, options.output is not None)
                _tell_op(console, name, threads, found)
    except KeyboardInterrupt:
        console.print(f"interrupted: {name} is left out, what was finished stays", highlight=False)
    finally:
        torch.set_num_threads(before)
    measured = [t for t in measured if t["ops"]]
    if options.json:
        report = {"schema": SCHEMA, "machine": machine.describe(), "races": races}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {options.json.resolve()}", soft_wrap=True, highlight=False)
    if path and measured:
        console.print(f"wrote {path.resolve()}", soft_wrap=True, highlight=False)
        if os.environ.get("FASTTX_TUNE") == "0":
            console.print(
                "FASTTX_TUNE=0 is set: no table is looked at while it is", highlight=False
            )
    return measured


def _kept(path: Path, strict: bool) -> list[dict]:
    """The tables of a file that is there. A damaged one of the user's is written anew; of a file
    that was named (strict) it is a ValueError."""
    try:
        if strict:
            return choice_tables.read(path.read_text()) if path.exists() else []
        return choice_tables.read_user(path)
    except ValueError as error:
        if strict:
            raise ValueError(f"{path}: {error}") from None
        return []


def _write(table: dict, path: Path, strict: bool) -> None:
    tables = choice_tables.merged(_kept(path, strict), table)
    choice_tables.write(path, tables, 0o644 if strict else 0o600)
    choice.forget()


def _tell_op(console: Console, name: str, threads: int, found: Races) -> None:
    classes = sum(len(each) for each in found.values())
    if not classes:
        console.print(f"{name}: one kernel runs it, nothing to choose", highlight=False)
        return
    gained = sum(len(entries(each)) for each in found.values())
    on = f" on {threads} thread{'s' * (threads > 1)}" if threads else ""
    console.print(
        f"{name}{on}: {gained} of {classes} classes go to another kernel than the first",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


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
    if not any(op.public == name and op.name in shape_classes.CLASSES for op in OPS.values()):
        return
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

    expected, wrong = outputs(op, args, first), ""
    for backend in backends[1:]:  # before a call that is timed changes its arguments
        if not agree(outputs(op, args, backend), expected):
            wrong = f"{backend} does not agree with {first}"
            backends = [b for b in backends if b != backend]
    calls = {b: call_of(b) for b in backends}
    seconds = {b: min(clock.measure(call, 1)[0] for _ in range(2)) for b, call in calls.items()}
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


def outputs(op: Op, args: tuple, backend: str) -> list[Tensor]:
    """What backends must agree on: a call's outputs, and copies of what it changes."""
    changed = [i for name in op.mutates if args[i := op.at[name]] is not None]
    args = tuple(a.clone() if i in changed else a for i, a in enumerate(args))
    found = dict(enumerate(generic._tuple(op(*args, backend=backend))))
    known = shape_classes.CLASSES.get(op.name)
    for free in known.free if known else ():
        del found[free]
    given = [args[i] for i in changed]
    return [t for t in (*found.values(), *given) if isinstance(t, Tensor) and t.numel()]


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
