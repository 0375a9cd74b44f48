"""``fasttx bench never-slower``: on every row of the grid, is fasttx at least as fast as PyTorch?

A row is a case in one dtype and direction. It fails when the upper end of the 95 % interval of its
ratio to the best of eager and SDPA is under 0.97, twice. Where PyTorch takes under 100 us a call of
fasttx may take 12 us more; those rows are counted apart. Where a call has to be right, and what is
compared with fp64, is the business of the tests and of ``fasttx bench op``; here a forward result
that does not even agree with PyTorch's fails the row.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from torch import Tensor

from . import grid, machine, providers
from .gate import AGREE
from .harness import Call, clock_for, interleave
from .ops import attention, generic
from .ops.attention_case import Case, tensors
from .options import Options, UsageError

LEAST = 0.97
SHORT_S = 100e-6
EXTRA_S = 12e-6
ROUNDS = (6, 15)  # the least that gives 95 %; of the second look
WORTH_TIMING = 1.5  # a contender this much slower than the best of PyTorch is not timed
MATH_MAX_BYTES = 1 << 30
DIRECTIONS = ("forward", "step")


@dataclass
class Result:
    """ratio: the best of PyTorch's time over fasttx's, with its interval. verdict: "pass" or
    "slower"; "short" and "short, slower" where PyTorch takes under 100 us; "wrong"."""

    op: str
    case: str
    dtype: str
    direction: str
    verdict: str
    best: str
    best_s: float
    fasttx_s: float
    ratio: float
    low: float
    high: float

    @property
    def failed(self) -> bool:
        return self.verdict in ("slower", "short, slower", "wrong")


def execute(options: Options, console: Console, names: tuple[str, ...]) -> int:
    """Walks the grid of the ops in names (none: all). Exit code 1 where a row fails."""
    for name in names:
        if name not in grid.names():
            raise UsageError(f"never-slower has no op {name!r}: {', '.join(grid.names())}")
    device, threads = torch.device(options.device), options.threads[0]
    torch.set_num_threads(threads)
    directions = DIRECTIONS if options.default_directions else options.directions
    started, results, left_out = time.monotonic(), [], []
    try:
        for name in names or grid.names():
            for dtype in options.dtypes:
                for case in grid.cases(name, dtype):
                    found = list(_rows(name, case, dtype, directions, device, threads, left_out))
                    for result in found:
                        console.print(_line(result), highlight=False, soft_wrap=True)
                    results += found
    except KeyboardInterrupt:
        left_out.append("interrupted: what was measured so far is here")
    report = {
        "schema": "fasttx-never-slower/1",
        "command": options.command,
        "machine": machine.describe(),
        "device": str(device),
        "threads": threads,
        "seconds": time.monotonic() - started,
        "rows": [asdict(r) for r in results],
        "left_out": left_out,
    }
    for path in filter(None, (options.json, options.out and options.out / "never_slower.json")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {Path(path).resolve()}", soft_wrap=True, highlight=False)
    console.print(_summary(results), highlight=False)
    return int(any(r.failed for r in results))


def _rows(name, case, dtype, directions, device, threads, left_out):
    allowed = getattr(case, "directions", DIRECTIONS)
    wanted = [d for d in directions if d in allowed or (d == "step" and "backward" in allowed)]
    for direction in wanted:
        try:
            contenders, agree = _contenders(case, direction, device)
        except NotImplementedError as why:
            left_out.append(f"{name} {case.name} {dtype} {direction}: {why}")
            continue
        yield _judge(name, case.name, dtype, direction, contenders, agree, device, threads)
        del contenders
        gc.collect()


def _judge(op, case, dtype, direction, calls, agree: bool, device, threads: int) -> Result:
    clock = clock_for(device, threads)
    ours = calls.pop("fasttx")
    if len(calls) > 1:
        first = {}
        for name, call in calls.items():
            call()
            first[name] = clock.measure(call, 1)[0]
        calls = {n: c for n, c in calls.items() if first[n] < WORTH_TIMING * min(first.values())}
    calls["fasttx"] = ours
    for rounds in ROUNDS:
        timings = interleave(calls, clock, 0.0, min_rounds=rounds)
        others = [n for n in timings if n != "fasttx"]
        best = min(others, key=lambda n: timings[n].interval.median)
        ratio = timings["fasttx"].ratio_to(timings[best])
        ours_s, best_s = (timings[n].interval.median for n in ("fasttx", best))
        short = best_s < SHORT_S
        slower = ours_s > best_s + EXTRA_S if short else ratio.high < LEAST
        if not slower:
            break
    verdict = "slower" if slower else "pass"
    if short:
        verdict = "short, slower" if slower else "short"
    return Result(
        op, case, dtype, direction, verdict if agree else "wrong", best, best_s, ours_s,
        ratio.median, ratio.low, ratio.high,
    )  # fmt: skip


def _contenders(case, direction: str, device) -> tuple[dict[str, Call], bool]:
    """The timed calls, and whether fasttx's forward agrees with a PyTorch's."""
    if isinstance(case, Case):
        return _attention(case, direction, device)
    problem = _Timed(case, device)
    calls = {name: problem.timed(name, direction) for name in case.contenders}
    checks = {name: case.checks.get(name, f) for name, f in case.contenders.items()}
    if any(check is None for check in checks.values()):
        return calls, True
    with torch.no_grad():
        found = [checks[name](problem.x) for name in ("fasttx", "eager")]
    return calls, _agree(*found)


class _Timed(generic.Problem):
    """A problem without its fp64 answer."""

    def __init__(self, case: generic.Work, device: torch.device):
        self.case, self.device = case, device
        self.x = case.make(device, torch.Generator(device=device).manual_seed(0))
        for name in case.leaves:
            self.x[name].requires_grad_()
        with torch.no_grad():
            self.upstream = generic._upstream(case.truth(self.x), case.torch_dtype)


def _attention(case: Case, direction: str, device) -> tuple[dict[str, Call], bool]:
    x = tensors(case, device)
    found: dict[str, ModuleType] = providers.find()
    calls = {}
    for name in ("fasttx", "sdpa", "eager"):
        size = case.batch * case.heads * case.queries * case.keys * case.torch_dtype.itemsize
        if name == "eager" and size * (2 if direction == "forward" else 5) > MATH_MAX_BYTES:
            continue
        call, leaves = found[name].attention(case, x, check=False)
        calls[name] = attention.timed_call(call, leaves, x.dout, direction)
    if case.dropout:
        return calls, True
    # In float32: in 16 bits SDPA's mask rounds a bias of -100 by half a unit.
    floats = {n: getattr(x, n) for n in ("q", "k", "v", "table") if getattr(x, n) is not None}
    wide = replace(x, **{n: t.detach().float() for n, t in floats.items()})
    with torch.no_grad():
        ours, theirs = (found[n].attention(case, on, check=False)[0]()
                        for n, on in (("fasttx", x), ("sdpa", wide)))  # fmt: skip
    return calls, _agree(ours, theirs)


def _agree(ours, theirs) -> bool:
    pairs = zip(generic._tuple(ours), generic._tuple(theirs), strict=True)
    return all(_close(a, b) for a, b in pairs if a.is_floating_point())


def _close(a: Tensor, b: Tensor) -> bool:
    difference = (a.float() - b.float()).square().mean().sqrt()
    return bool(
        difference <= max(AGREE[a.dtype], AGREE[b.dtype]) * b.float().square().mean().sqrt() + 1e-6
    )


def _line(r: Result) -> str:
    what = f"{r.op} {r.case} {r.dtype} {r.direction}"
    times = f"{r.fasttx_s * 1e6:.4g} us against {r.best_s * 1e6:.4g} us ({r.best})"
    return f"{r.verdict:13} {r.ratio:6.2f}x [{r.low:.2f}, {r.high:.2f}]  {what}: {times}"


def _summary(results: list[Result]) -> str:
    long = [r for r in results if not r.verdict.startswith("short")]
    short = [r for r in results if r.verdict.startswith("short")]
    lines = ["", *(_line(r) for r in results if r.failed)]
    for text, rows in (("rows of 100 us and more", long), ("shorter rows", short)):
        lines.append(f"{len(rows)} {text}, {sum(r.failed for r in rows)} failing")
    return "\n".join(lines)
