"""``fasttx bench ... --base REF``: the same cases by another commit of fasttx.

The commit is taken out of this checkout's history and built in the user's cache, by the same
compiler and for the same torch, once; a commit whose native sources are those of a build that is
kept takes its libraries. Two libraries of one name cannot be loaded together, so each
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

from . import ops, plans, report
from .apart import NOTE as APART
from .apart import Apart
from .contest import Contender, Group, rows_of
from .gate import Error, Verdict
from .harness import Timing, clock_for, interleave
from .options import Options, UsageError
from .rows import Row, Run
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
    made_for = f"{versions}-{hashlib.sha256(how.encode()).hexdigest()[:8]}"
    folder = home / f"{commit[:12]}-{made_for}"
    if folder.is_dir():
        os.utime(folder)
        return folder
    partly = Path(tempfile.mkdtemp(dir=home, prefix=f".{folder.name}-"))
    try:
        _take_out(commit, partly)
        if libraries := _same_libraries(commit, home, made_for):
            for library in libraries:
                shutil.copy2(library, partly / "fasttx")
        else:
            console.print(
                f"building {commit[:12]} in {home}, once", highlight=False, soft_wrap=True
            )
            _build(commit, partly)
        with contextlib.suppress(OSError):  # somebody else built it meanwhile
            partly.rename(folder)
    finally:
        shutil.rmtree(partly, ignore_errors=True)
    old = sorted((f for f in home.iterdir() if f.name[0] != "."), key=lambda f: f.stat().st_mtime)
    for each in old[:-KEPT]:
        shutil.rmtree(each, ignore_errors=True)
    return folder


def _same_libraries(commit: str, home: Path, made_for: str) -> list[Path]:
    """The native libraries of another build here that has the same sources of them."""
    sources = _native_sources(commit)
    for other in sorted(home.glob(f"[!.]*-{made_for}")) if sources else ():
        if _native_sources(other.name.partition("-")[0]) == sources:
            return sorted((other / "fasttx").glob("*.so"))
    return []


def _native_sources(commit: str) -> str | None:
    """git's names of a commit's csrc/ and setup.py, which change with what is in them."""
    found = _git("rev-parse", "--verify", "--quiet", f"{commit}:csrc")
    script = _git("rev-parse", "--verify", "--quiet", f"{commit}:setup.py")
    if found.returncode or script.returncode:
        return None
    return found.stdout + script.stdout


def _build(commit: str, folder: Path) -> None:
    status, told = _run([sys.executable, "setup.py", "build_ext", "--inplace"], folder)
    if status:
        last = " | ".join(told.strip().splitlines()[-5:])
        raise UsageError(f"--base: {commit[:12]} does not build here: {last}")
    shutil.rmtree(folder / "build", ignore_errors=True)


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


class Commit(Apart):
    """A process with one commit's fasttx, which says whose error it is."""

    def __init__(self, label: str, *arguments):
        self.label = label
        super().__init__(*arguments)

    def _answer(self):
        try:
            return super()._answer()
        except RuntimeError as why:
            raise RuntimeError(f"{self.label} cannot run it: {why}") from None


class BaseSession(Session):
    """A session whose two contenders are the commits."""

    def __init__(self, options: Options, console: Console, ref: str):
        if options.device != "cpu":
            raise UsageError(f"--base times on the CPU alone, not on {options.device}")
        commit = commit_of(ref)
        self.roots = {"base": built(commit, console), "fasttx": ROOT}
        self._running: dict[int, list[dict[str, Commit]]] = {}
        super().__init__(options, console)
        self.ref, self.labels = ref, {"base": f"{ref} ({commit[:12]})", "fasttx": "fasttx now"}
        self.run.notes.append(f"ratio: the time of {ref} ({commit}) over the time now. {NOTE}")

    def _usable_providers(self) -> dict:
        return {}

    def plan(self) -> list[Step]:
        steps = [
            step
            for name in self.options.ops
            for index, case in enumerate(self.cases(ops.find(name)))
            for step in self._op_steps(name, index, case)
        ]
        for kind, case in plans.cases(self):
            asked = {"kind": kind.module, "made": case.made, "given": case.given}
            steps.append(self._step(case.title, asked, case.threads, plans.seconds(self, kind)))
        return steps

    def _op_steps(self, op: str, index: int, case) -> list[Step]:
        options = self.options
        directions = options.directions
        if options.default_directions:
            directions = getattr(case, "directions", directions)
        steps = []
        for threads in options.threads:
            for direction in directions:
                name = f"{case.name} {case.dtype}"
                asked = {"kind": "op", "op": op, "index": index, "name": name}
                asked["direction"] = direction
                title = f"{op} {name} {direction}, {threads} thr."
                seconds = options.budget_s or SECONDS[options.suite]
                steps.append(self._step(title, asked, threads, seconds))
        return steps

    def _step(self, title: str, asked: dict, threads: int, seconds: float) -> Step:
        def measure(budget: float, on_round) -> list[Row]:
            return self._compare(title, asked, threads, budget)

        return Step(title, seconds, measure)

    def _hurried(self) -> bool:
        """Models take their time: most of it goes by before they are timed."""
        options = self.options
        models = options.models or options.layers or options.training or options.generation
        return super()._hurried() and not models

    def execute(self) -> Run:
        try:
            run = super().execute()
        finally:
            self._close()
        if not run.rows and run.skipped:
            what, why = run.skipped[-1].values()
            raise UsageError(f"--base {self.ref}: nothing could be compared: {what}: {why}")
        return run

    def _close(self) -> None:
        while self._running:
            _, pairs = self._running.popitem()
            for process in (p for pair in pairs for p in pair.values()):
                process.close()

    def _pairs(self, threads: int) -> list[dict[str, Commit]]:
        if threads not in self._running:
            self._running[threads] = pairs = []
            asked = {"device": str(self.device), "options": self.chosen()}
            for _ in range(PAIRS):
                pairs.append({})
                for name, root in self.roots.items():
                    pairs[-1][name] = self._start(name, root, asked, threads)
        return self._running[threads]

    def _start(self, name: str, root: Path, asked: dict, threads: int) -> Commit:
        cases = str(ROOT / "benchmarks")
        command = ("env", *KEEP_MEMORY, sys.executable, "-c", _BOOT, str(root), cases)
        try:
            return Commit(self.labels[name], "base_case:prepare", asked, threads, command)
        except RuntimeError as why:
            raise UsageError(f"--base: {why}") from None

    def _compare(self, title: str, asked: dict, threads: int, seconds: float) -> list[Row]:
        """The rows of all of fasttx's ways to do the case that both commits have."""
        rows: list[Row] = []
        try:
            pairs = self._pairs(threads)
            for process in (p for pair in pairs for p in pair.values()):
                process("open", **asked)
            told = {name: process("checked") for name, process in pairs[0].items()}
            for provider, about in told["fasttx"]["ours"].items():
                if provider not in told["base"]["ours"]:
                    self._leave_out(f"{title}, {about['label']}", "base", told)
                    continue
                group = Group(**told["fasttx"]["group"] | {"base": "base"})
                group.case += f", {about['label']}" if about["label"] else ""
                verdicts = {name: t["ours"][provider]["verdict"] for name, t in told.items()}
                rows += self._take_turns(group, provider, verdicts, threads, seconds)
            if not told["fasttx"]["ours"]:
                self._leave_out(title, "fasttx", told)
        except RuntimeError as why:
            # A process is gone: the next row gets new ones.
            self._close()
            self.run.skip(title, str(why))
        return rows

    def _leave_out(self, what: str, who: str, told: dict) -> None:
        why = "; ".join(told[who]["left_out"]) or "it has no such way"
        self.run.skip(what, f"{self.labels[who]} cannot run it: {why}")

    def _take_turns(
        self, group: Group, provider: str, verdicts: dict, threads: int, seconds: float
    ) -> list[Row]:
        timings: dict[str, Timing] = {}
        for pair in self._pairs(threads):
            for process in pair.values():
                process("take", provider=provider)
            more = interleave(pair, clock_for(self.device, threads), seconds / PAIRS)
            for name, timing in more.items():
                if name in timings:
                    timings[name].samples += timing.samples
                    timings[name].rejected += timing.rejected
                else:
                    timings[name] = timing
        contenders = {
            name: Contender(self.labels[name], pair[name], _verdict(verdicts[name]), notes=[APART])
            for name in ("fasttx", "base")
        }
        return rows_of(group, contenders, timings, self.device, threads, self.run)

    def _tell(self, step: Step, rows: list[Row]) -> None:
        for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
            times = f"{report.seconds(theirs.median_s)} -> {report.seconds(ours.median_s)}"
            ratio = f"not compared: {ours.why or theirs.why}"
            if ours.ratio is not None:
                ratio = f"{ours.ratio:.2f}x [{ours.ratio_low:.2f}, {ours.ratio_high:.2f}]"
            self.console.print(
                f"{ours.case} {ours.dtype} {ours.direction}, {ours.threads} thr.: "
                f"{ratio}, {times}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip


def _verdict(told: dict) -> Verdict:
    def errors(found: dict) -> dict:
        return {name: Error(**error) for name, error in found.items()}

    return Verdict(told["ok"], errors(told["errors"]), errors(told["plain"]), told["why"])
