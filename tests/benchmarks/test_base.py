"""`--base REF`: another commit's build, and its process beside this one's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fasttx.benchmarks import base, base_case, ops
from fasttx.benchmarks.options import Options, UsageError
from fasttx.benchmarks.run import main
from rich.console import Console

QUIET = Console(quiet=True)
SETUP = """\
import sys
from pathlib import Path
assert sys.argv[1:] == ["build_ext", "--inplace"]
{}
Path("made").write_text("once")
Path("build").mkdir()
"""


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A repository with a commit that builds and one that does not."""
    root = tmp_path / "checkout"
    root.mkdir()

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b.example", *words],
            cwd=root, check=True, capture_output=True,
        )  # fmt: skip

    git("init", "-q")
    for tag, line in (("good", ""), ("bad", "sys.exit('the compiler is unhappy')")):
        (root / "setup.py").write_text(SETUP.format(line))
        git("add", "setup.py")
        git("commit", "-q", "-m", tag)
        git("tag", tag)
    monkeypatch.setattr(base, "ROOT", root)
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "cache"))
    return root


def test_a_commit_is_built_once(checkout, monkeypatch):
    folder = base.built(base.commit_of("good"), QUIET)
    assert (folder / "made").read_text() == "once"
    assert not (folder / "build").exists()
    (folder / "made").write_text("twice")
    assert base.built(base.commit_of("good"), QUIET) == folder
    assert (folder / "made").read_text() == "twice"
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setenv("CXX", "another compiler")
    assert base.built(base.commit_of("good"), QUIET) != folder


def test_a_commit_that_does_not_build(checkout):
    with pytest.raises(UsageError, match="does not build here: the compiler is unhappy"):
        base.built(base.commit_of("bad"), QUIET)
    assert list((checkout.parent / "cache" / "base").iterdir()) == []


def test_the_oldest_builds_go(checkout):
    home = checkout.parent / "cache" / "base"
    for i in range(base.KEPT + 2):
        (home / f"old{i}").mkdir(parents=True)
    folder = base.built(base.commit_of("good"), QUIET)
    kept = list(home.iterdir())
    assert len(kept) == base.KEPT
    assert folder in kept


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("nonsense", "git knows no such commit here"),
        ("good:setup.py", "git knows no such commit here"),
        ("--help", "give a commit, a branch or a tag"),
        ("", "git knows no such commit here"),
    ],
)
def test_wrong_refs(checkout, ref, words):
    with pytest.raises(UsageError, match=words):
        base.commit_of(ref)


def test_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with pytest.raises(UsageError, match="--base needs a git checkout of fasttx"):
        base.commit_of("HEAD")


@pytest.mark.parametrize(
    "arguments", [["never-slower", "--base", "HEAD"], ["softmax", "--musts", "--base", "HEAD"]]
)
def test_goals_and_the_grid_have_no_base(arguments, capsys):
    assert main(arguments) == 2
    assert "--base compares --quick or --full" in capsys.readouterr().err


OPTIONS = {"suite": "quick", "dtypes": ("fp32",)}


@pytest.mark.parametrize("op", ["rope", "attention"])
def test_a_case_in_the_other_process(op, monkeypatch):
    module = ops.find(op)
    if op == "rope":
        work = module.work("fp32", 1, 2, 1, 4, 8, goal=None)
    else:
        work = module.sized_cases(("fp32",), (8,), 1, 2, 8)[0]
    monkeypatch.setattr(ops, "cases", lambda *a, **k: [work])
    calls = base_case.prepare(1, "cpu", OPTIONS)
    name = f"{work.name} fp32"
    calls["open"](op, 0, name, "step" if op == "rope" else "backward")
    assert calls["call"]() is None
    told = json.loads(json.dumps(calls["verdict"]()))
    verdict = base._verdict(told)
    assert verdict.ok
    assert verdict.worst is not None
    with pytest.raises(ValueError, match="not another case fp32"):
        calls["open"](op, 0, "another case fp32", "forward")


@pytest.mark.slow
def test_two_processes(monkeypatch, tmp_path):
    """This commit beside itself, in four processes; a case that one lacks is left out."""
    monkeypatch.setattr(base, "built", lambda commit, console: base.ROOT)
    monkeypatch.setattr(base, "commit_of", lambda ref: "0123456789abcdef")
    options = Options(
        ops=("call_overhead",), models=(), dtypes=("fp32",), budget_s=0.1, command="test"
    )
    session = base.BaseSession(options, QUIET, "before")
    run = session.execute()
    assert not session._running
    cases = ops.cases(ops.find("call_overhead"), "quick", ("fp32",))
    assert len(run.rows) == 2 * len(cases)
    for ours, theirs in zip(run.rows[::2], run.rows[1::2], strict=True):
        assert (ours.provider, theirs.provider) == ("fasttx", "base")
        assert ours.ratio_to == "base"
        assert ours.ratio_low <= ours.ratio <= ours.ratio_high
        assert ours.ok
        assert theirs.label == "before (0123456789ab)"
    assert any("took turns" in note for note in run.notes)
    asked = {"op": "call_overhead", "index": 0, "name": "nonsense", "direction": "forward"}
    assert session._compare(asked, cases[0], 1, 0.1) == []
    assert "before (0123456789ab): ValueError: case 0" in run.skipped[-1]["why"]


def test_the_boot_takes_fasttx_from_the_folder_given(tmp_path):
    (tmp_path / "fasttx").mkdir()
    (tmp_path / "fasttx" / "__init__.py").write_text("old = True\n")
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "__init__.py").touch()
    (tmp_path / "cases" / "apart.py").write_text(
        "import fasttx, sys\nprint(fasttx.old, sys.argv[1], __package__, __name__)\n"
    )
    words = [sys.executable, "-c", base._BOOT, str(tmp_path), str(tmp_path / "cases"), "asked"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path.home())
    assert done.stdout.split() == ["True", "asked", "fasttx.benchmarks", "__main__"]
