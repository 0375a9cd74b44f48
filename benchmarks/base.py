"""``fasttx bench ... --base REF``: the same cases by another commit of fasttx.

The commit is taken out of this checkout's history and built in the user's cache, by the same
compiler and for the same torch, once. Two libraries of one name cannot be loaded together, so each
commit has a process of its own, and the processes take turns, A B A B, as contenders in one process
do; both run this commit's cases, each with its own fasttx. A row's ratio is the base's time over
the time now, with its interval: above 1, fasttx has become faster.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from fasttx import choice_tables

from . import ops, report
from .apart import Apart
from .gate import Error, Verdict
from .harness import Timing, clock_for, interleave
from .options import Options, UsageError
from .rows import Row, Run, set_ratios
from .session import Session, Step

ROOT = Path(__file__).resolve().parent.parent
BUILT_BY = ("CXX", "FASTTX_NATIVE", "FASTTX_CUDA", "FASTTX_CUDA_ARCHS", "FASTTX_NVCC")
KEPT = 4  # builds in the cache
PAIRS = 2  # of processes: where memory lies is a process's luck
# Freed memory is kept, so that page faults, which come with a process's history, do not decide.
KEEP_MEMORY = ("MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=17179869184")
SECONDS = {"quick": 4.0, "full": 8.0}
NOTE = "two processes took turns: two commits of one library cannot be loaded into one"

# Runs apart.py with fasttx out of one folder and the cases out of another.
_BOOT = """\
import importlib.abc, importlib.util, runpy, sys
from pathlib import Path
root, cases = map(Path, sys.argv[1:3])
HOMES = {"fasttx": root / "fasttx", "fasttx.kernels": root / "kernels",
         "fasttx.benchmarks": cases}
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in HOMES:
            return importlib.util.spec_from_file_location(
                name, HOMES[name] / "__init__.py", submodule_search_locations=[str(HOMES[name])])
sys.meta_path.insert(0, Finder())
del sys.argv[1:3]
import fasttx
assert Path(fasttx.__file__).parent == HOMES["fasttx"], fasttx.__file__
runpy.run_module("fasttx.benchmarks.apart", run_name="__main__")
"""


def commit_of(ref: str) -> str:
    """The full name of a commit of this checkout."""
    if not (ROOT / ".git").exists():
        raise UsageError(f"--base needs a git checkout of fasttx, and {ROOT} is none")
    if ref.startswith("-"):
        raise UsageError(f"--base {ref}: give a commit, a branch or a tag")
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if found.returncode:
        raise UsageError(f"--base {ref}: git knows no such commit here")
    return found.stdout.strip()


def built(commit: str, console: Console) -> Path:
    """A folder with that commit's fasttx, built; UsageError with the compiler's last words."""
    home = choice_tables.cache_folder() / "base"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    how = repr([os.environ.get(name) for name in BUILT_BY])
    versions = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    tag = f"{commit[:12]}-{versions}-{hashlib.sha256(how.encode()).hexdigest()[:8]}"
    folder = home / tag
    if folder.is_dir():
        os.utime(folder)
        return folder
    console.print(f"building {commit[:12]} in {home}, once", highlight=False, soft_wrap=True)
    partly = Path(tempfile.mkdtemp(dir=home, prefix=f".{tag}-"))
    try:
        _take_out(commit, partly)
        status, told = _run([sys.executable, "setup.py", "build_ext", "--inplace"], partly)
        if status:
            last = " | ".join(told.strip().splitlines()[-5:])
            raise UsageError(f"--base: {commit[:12]} does not build here: {last}")
        shutil.rmtree(partly / "build", ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else built it meanwhile
            partly.rename(folder)
    finally:
        shutil.rmtree(partly, ignore_errors=True)
    old = sorted((f for f in home.iterdir() if f.name[0] != "."), key=lambda f: f.stat().st_mtime)
    for each in old[:-KEPT]:
        shutil.rmtree(each, ignore_errors=True)
    return folder


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output. Interrupted, it takes the compilers with it."""
    process = subprocess.Popen(
        command, cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        told, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return process.returncode, told


def _take_out(commit: str, folder: Path) -> None:
    archive = subprocess.Popen(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE)
    done = subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=False)
    archive.stdout.close()
    if archive.wait() or done.returncode:
        raise UsageError(f"--base: git could not take {commit[:12]} out")


def _git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)


class BaseSession(Session):
    """A session whose two contenders are the commits."""

    def __init__(self, options: Options, console: Console, ref: str):
        if not options.ops:
            raise UsageError("--base compares ops: name one, or give none for attention")
        commit = commit_of(ref)
        self.roots = {"base": built(commit, console), "fasttx": ROOT}
        self._running: dict[int, list[dict[str, Apart]]] = {}
        super().__init__(options, console)
        self.labels = {"base": f"{ref} ({commit[:12]})", "fasttx": "fasttx now"}
        if options.models:
            self.run.skip(", ".join(options.models), "--base compares ops")
        self.run.notes.append(f"ratio: the time of {ref} ({commit}) over the time now. {NOTE}")

    def _usable_providers(self) -> dict:
        return {}

    def plan(self) -> list[Step]:
        return [
            step
            for name in self.options.ops
            for index, case in enumerate(self.cases(ops.find(name)))
            for step in self._steps(name, index, case)
        ]

    def _steps(self, op: str, index: int, case) -> list[Step]:
        options = self.options
        directions = options.directions
        if options.default_directions:
            directions = getattr(case, "directions", directions)
        steps = []
        for threads in options.threads:
            for direction in directions:

                def measure(seconds, on_round, threads=threads, direction=direction):
                    name = f"{case.name} {case.dtype}"
                    asked = {"op": op, "index": index, "name": name, "direction": direction}
                    return self._compare(asked, case, threads, seconds)

                title = f"{case.name} {case.dtype} {direction}, {threads} thr."
                steps.append(Step(title, options.budget_s or SECONDS[options.suite], measure))
        return steps

    def execute(self) -> Run:
        try:
            return super().execute()
        finally:
            self._close()

    def _close(self) -> None:
        while self._running:
            _, pairs = self._running.popitem()
            for process in (p for pair in pairs for p in pair.values()):
                process.close()

    def _pairs(self, threads: int) -> list[dict[str, Apart]]:
        if threads not in self._running:
            self._running[threads] = pairs = []
            asked = {"device": str(self.device), "options": self.chosen()}
            for _ in range(PAIRS):
                pairs.append({})
                for name, root in self.roots.items():
                    pairs[-1][name] = self._start(name, root, asked, threads)
        return self._running[threads]

    def _start(self, name: str, root: Path, asked: dict, threads: int) -> Apart:
        cases = str(ROOT / "benchmarks")
        command = ("env", *KEEP_MEMORY, sys.executable, "-c", _BOOT, str(root), cases)
        try:
            return Apart("base_case:prepare", asked, threads, command)
        except RuntimeError as why:
            raise UsageError(f"--base: {self.labels[name]} does not start: {why}") from None

    def _open(self, name: str, process: Apart, asked: dict) -> None:
        try:
            process("open", **asked)
        except RuntimeError as why:
            # Its process is gone: the next row gets new ones.
            self._close()
            raise RuntimeError(f"{self.labels[name]}: {why}") from None

    def _compare(self, asked: dict, case, threads: int, seconds: float) -> list[Row]:
        timings: dict[str, Timing] = {}
        try:
            for pair in self._pairs(threads):
                for name, process in pair.items():
                    self._open(name, process, asked)
                if not timings:
                    verdicts = {name: _verdict(p("verdict")) for name, p in pair.items()}
                more = interleave(pair, clock_for(self.device, threads), seconds / PAIRS)
                for name, timing in more.items():
                    if name in timings:
                        timings[name].samples += timing.samples
                        timings[name].rejected += timing.rejected
                    else:
                        timings[name] = timing
        except RuntimeError as why:
            self.run.skip(f"{asked['op']} {asked['name']} {asked['direction']}", str(why))
            return []
        rows = []
        for name in reversed(timings):
            flops, moved = _work(case, asked["direction"])
            row = Row(
                "op", asked["op"], case.name, asked["direction"], name, self.labels[name],
                case.dtype, str(self.device), threads, timings[name].clock,
            )  # fmt: skip
            row.set_timing(timings[name])
            row.set_rate(flops, self.run.limits_for(str(self.device), threads), moved)
            row.set_verdict(verdicts[name])
            rows.append(row)
        set_ratios(rows, timings, "base")
        return rows

    def _tell(self, step: Step, rows: list[Row]) -> None:
        for row in rows:
            if row.provider == "fasttx" and row.ratio is not None:
                times = " -> ".join(report.seconds(r.median_s) for r in reversed(rows))
                self.console.print(
                    f"{step.title}: {row.ratio:.2f}x [{row.ratio_low:.2f}, {row.ratio_high:.2f}], "
                    f"{times}",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip


def _verdict(told: dict) -> Verdict:
    def errors(found: dict) -> dict:
        return {name: Error(**error) for name, error in found.items()}

    return Verdict(told["ok"], errors(told["errors"]), errors(told["plain"]), told["why"])


def _work(case, direction: str) -> tuple[int | None, int | None]:
    if callable(case.flops):
        return case.flops(direction), None
    return case.flops.get(direction), case.moved.get(direction)
