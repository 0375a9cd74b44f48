"""The items that are other programs: the build, pytest, compute-sanitizer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from .isolate import Refused
from .record import Item, Record, write_atomically

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Traced calls and opcheck run where their tensors are, which is not where the kernels are.
ELSEWHERE = "(triton or cuda) and not opcheck and not compile"
BACKENDS = ("triton", "cuda")
SMALL = "small and bfloat16"
_TAIL = 3000
_SANITIZER_FAILED = 77


def _run(command: list[str], seconds: float, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False,
    )  # fmt: skip


def _line(command: list[str], **environment: str) -> str:
    command = ["python", *command[1:]] if command[0] == sys.executable else command
    return " ".join([*(f"{k}={v}" for k, v in environment.items()), shlex.join(command)])


def builds() -> list[Item]:
    command = [sys.executable, "-m", "pip", "install", "-q", "-e", ".", "--no-build-isolation",
               "--no-deps"]  # fmt: skip
    return [
        Item(
            "build", "build/install", f"{__name__}:build", {"command": command}, _line(command), 590
        )
    ]


def build(command: list[str]) -> dict[str, Any]:
    start = time.monotonic()
    done = _run(command, 580)
    if done.returncode:
        raise RuntimeError(done.stdout[-_TAIL:])
    info = _run([sys.executable, "-m", "fasttx.cli", "info"], 120)
    if info.returncode:
        raise RuntimeError(info.stdout[-_TAIL:])
    return {"install_s": round(time.monotonic() - start, 1), "info": info.stdout}


def suites(root: Path = ROOT) -> list[Item]:
    items = [_test_item(f"gpu_{b}", ["tests/gpu", "-k", b], {}) for b in ("triton", "cuda")]
    items.append(_test_item("emulator", ["tests/gpu/test_emulator.py"], {}))
    for path in sorted((root / "tests/ops").glob("test_*.py")):
        # What tests the C++ kernels by themselves has no GPU.
        if not path.stem.startswith("test_cpu_"):
            target = [str(path.relative_to(root)), "-k", ELSEWHERE]
            items.append(_test_item(path.stem, target, {"FASTTX_TEST_DEVICE": "cuda"}))
    return items


def _test_item(name: str, target: list[str], environment: dict[str, str]) -> Item:
    arguments = {"target": target, "environment": environment}
    line = _line(["python", "-m", "pytest", *target], **environment)
    return Item("test", f"test/{name}", f"{__name__}:run_tests", arguments, line, 580)


def run_tests(target: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """pytest's counts, and each failure with the line that repeats it alone."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", *target, f"--junitxml={report}",
                   "-p", "no:cacheprovider", *_workers()]  # fmt: skip
        try:
            done = _run(command, 560, **environment)
        except subprocess.TimeoutExpired as late:
            text = late.stdout or b""
            text = text.decode(errors="replace") if isinstance(text, bytes) else text
            raise RuntimeError("not over in 560 s\n" + text[-_TAIL:]) from None
        if not report.exists():
            raise RuntimeError(done.stdout[-_TAIL:])
        found = parse_junit(report, environment)
    if not found["passed"] and not found["failures"]:
        raise RuntimeError("no test ran\n" + done.stdout[-_TAIL:])
    return found


def _workers() -> list[str]:
    """Four processes share the card, where pytest-xdist is installed."""
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401

        return ["-n", "4", "--dist", "worksteal"]
    return []


def parse_junit(report: Path, environment: dict[str, str]) -> dict[str, Any]:
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    failures, reasons, ran = [], {}, set()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = next((e for e in case if e.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        counts["failed" if bad is not None else "skipped" if skipped is not None else "passed"] += 1
        if skipped is not None:
            reason = skipped.get("message", "")
            reasons[reason] = reasons.get(reason, 0) + 1
        elif bad is None:
            ran |= {b for b in BACKENDS if re.search(rf"\b{b}\b", case.get("name", ""))}
        if bad is not None:
            node = _node(case)
            line = _line(["python", "-m", "pytest", node], **environment)
            message = (bad.get("message") or bad.text or "")[:500]
            failures.append({"what": node, "message": message, "reproduce": line})
    return {**counts, "backends": sorted(ran), "skip_reasons": reasons, "failures": failures}


def _node(case: ElementTree.Element) -> str:
    parts = case.get("classname", "").split(".")
    return "/".join(parts) + ".py::" + case.get("name", "")


def remember(record: Record, path: Path) -> None:
    """Writes into gpu_runs.json which ops' tests passed on this card, by backend."""
    runs = json.loads(path.read_text())
    for key, outcome in record.outcomes.items():
        op = key.removeprefix("test/test_")
        if op == key or outcome.status != "ok":
            continue
        for backend in outcome.result["backends"]:
            runs.setdefault(op, {})[backend] = {
                "card": record.machine["gpu"],
                "date": outcome.at[:10],
                "commit": record.machine["commit"] or "",
            }
    write_atomically(path, json.dumps(runs, indent=1, sort_keys=True) + "\n")


def sanitizers() -> list[Item]:
    items = []
    for tool in TOOLS:
        target = [sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu/test_gpu.py", "-k", SMALL,
                  "-p", "no:cacheprovider", "-p", "no:xdist"]  # fmt: skip
        command = ["compute-sanitizer", "--tool", tool, f"--error-exitcode={_SANITIZER_FAILED}",
                   "--target-processes=all", *target]  # fmt: skip
        # Each tensor its own allocation, so that what is written past one is seen.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        arguments = {"command": command, "environment": environment}
        line = _line([*command[:5], "python", *target[1:]], **environment)
        items.append(
            Item("sanitize", f"sanitize/{tool}", f"{__name__}:sanitize", arguments, line, 400)
        )
    return items


def sanitize(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not on the PATH")
    done = _run(command, 390, **environment)
    if refusal := re.search(r"Device not supported.*|Unable to find .*device.*", done.stdout):
        raise Refused(refusal.group(0))
    summary = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", done.stdout)
    if done.returncode or summary is None:
        raise RuntimeError(done.stdout[-_TAIL:])
    return {"summary": summary.group(0)}
