"""A run that is killed, again and again and anywhere, ends where one does that never was."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import killed
from .test_loop import files, log

ROOT = Path(__file__).resolve().parents[2]


def start(*args) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.killed", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> int:
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def same(folder, whole) -> None:
    assert files(folder) == files(whole)
    assert log(folder) == log(whole)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000012"]
    kept, expected = ({p.name: p.read_bytes() for p in (f / "model").iterdir()}
                      for f in (folder, whole))  # fmt: skip
    assert kept == expected


def test_killed_while_it_saves_and_between(tmp_path):
    """Each process goes on from what the one before left, and is killed a bit later."""
    killed.run(tmp_path / "whole")
    for where, call in (("tensors", 1), ("step", 4), ("rename", 1), ("disk", 2)):
        assert finished(start(tmp_path / "run", where, call)) == -signal.SIGKILL
    killed.run(tmp_path / "run")
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", killed.PLACES)
def test_killed_at_every_call(where, tmp_path):
    killed.run(tmp_path / "whole")
    for call in (0, 1, 2, 4, 7):
        folder = tmp_path / f"{call}"
        finished(start(folder, where, call))
        killed.run(folder)
        same(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_by_the_clock(tmp_path):
    killed.run(tmp_path / "whole")
    draw, kills = random.Random(0), 0
    for _ in range(100):
        process = start(tmp_path / "run")
        while process.poll() is None and not (tmp_path / "run").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        process.kill()
        kills += finished(process) != 0
        if (tmp_path / "run/model").exists():
            break
    killed.run(tmp_path / "run")
    assert kills > 0
    same(tmp_path / "run", tmp_path / "whole")
