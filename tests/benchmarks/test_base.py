"""`--base REF`: another commit's build, and its process beside this one's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fasttx.benchmarks import base, base_case, ops
from fasttx.benchmarks.models import families, layers, train
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
def commit():
    """Commits texts by file in `base.ROOT`, under a tag."""

    def make(tag, files):
        for name, text in files.items():
            path = base.ROOT / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        who = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        for words in (["add", "."], [*who, "commit", "-q", "-m", tag], ["tag", tag]):
            assert base._git(*words).returncode == 0
        return base.commit_of(tag)

    return make


@pytest.fixture
def checkout(monkeypatch, tmp_path, commit):
    """A repository with a commit that builds and one that does not."""
    root = tmp_path / "checkout"
    root.mkdir()
    monkeypatch.setattr(base, "ROOT", root)
    base._git("init", "-q")
    for tag, line in (("good", ""), ("bad", "sys.exit('the compiler is unhappy')")):
        commit(tag, {"setup.py": SETUP.format(line)})
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


def test_a_commit_of_the_same_native_sources_takes_the_libraries(checkout, commit):
    made = "from os import urandom\nPath('fasttx/lib.so').write_bytes(urandom(8))"
    first = commit("first", {"setup.py": SETUP.format(made), "csrc/a.cpp": "1", "fasttx/a": "1"})
    second = commit("second", {"fasttx/a": "2"})
    third = commit("third", {"csrc/a.cpp": "3"})
    folders = [base.built(commit, QUIET) for commit in (first, second, third)]
    libraries = [(folder / "fasttx" / "lib.so").read_bytes() for folder in folders]
    assert libraries[0] == libraries[1] != libraries[2]
    assert not (folders[1] / "made").exists()
    assert [(folder / "fasttx" / "a").read_text() for folder in folders] == ["1", "2", "2"]


def test_only_the_cpu(checkout):
    with pytest.raises(UsageError, match="--base times on the CPU alone, not on cuda"):
        base.BaseSession(Options(device="cuda"), QUIET, "good")


OPTIONS = {"suite": "quick", "dtypes": ("fp32",)}
LAYER = {
    "kind": "layers",
    "made": {"name": "bert", "dtype": "fp32", "size": [2, 6]},
    "given": {"direction": "step"},
}
TRAINING = {
    "kind": "train", "made": {"name": "toy-t5", "dtype": "fp32"}, "given": {"size": [3, 6]}
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """A small layer, a small training step, and one case of rope."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    known = families.FAMILIES["bert-base"]
    config = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    small = families.Family(known.head, known.config_class, config, known.batches, known.kind)
    monkeypatch.setitem(families.FAMILIES, "bert-base", small)
    toy = train.TOYS["toy-t5"]
    small = train.Toy(toy.family, toy.config, 3, (4, 6), (2, 6))
    monkeypatch.setitem(train.TOYS, "toy-t5", small)


@pytest.mark.parametrize("op", ["rope", "attention"])
def test_an_op_in_the_other_process(op, monkeypatch):
    module = ops.find(op)
    if op == "rope":
        work = module.work("fp32", 1, 2, 1, 4, 8, goal=None)
    else:
        work = module.sized_cases(("fp32",), (8,), 1, 2, 8)[0]
    monkeypatch.setattr(ops, "cases", lambda *a, **k: [work])
    process = Here()
    asked = {"kind": "op", "op": op, "index": 0, "name": f"{work.name} fp32"}
    process("open", **asked, direction="step" if op == "rope" else "backward")
    told = process("checked")
    assert told["group"]["case"] == work.name and told["group"]["shape"]
    assert list(told["ours"]) == ["fasttx"]
    verdict = base._verdict(told["ours"]["fasttx"]["verdict"])
    assert verdict.ok
    assert verdict.worst is not None
    process("take", provider="fasttx")
    assert process() is None
    with pytest.raises(RuntimeError, match=f"case 0 of {op} is not another case fp32"):
        process("open", **asked | {"name": "another case fp32"}, direction="forward")


@pytest.mark.parametrize("asked", [LAYER, TRAINING])
def test_a_model_in_the_other_process(asked, tiny):
    process = Here()
    process("open", **asked)
    told = process("checked")
    ways = ["fasttx", "fasttx_models"]
    if asked is LAYER:
        ways = ["fasttx", "fasttx_nn", "fasttx_torch_nn"]
    assert list(told["ours"]) == ways
    assert told["group"]["kind"] == ("layer" if asked is LAYER else "train")
    assert told["group"]["tokens"] > 0
    for provider, about in told["ours"].items():
        assert base._verdict(about["verdict"]).ok, about
        process("take", provider=provider)
        assert process() is None


class Here:
    """The other process, in this one: what it says goes through JSON all the same."""

    def __init__(self):
        self._calls = base_case.prepare(1, "cpu", OPTIONS)

    def __call__(self, what="call", **arguments):
        try:
            told = self._calls[what](**json.loads(json.dumps(arguments)))
        except (ValueError, AttributeError) as why:
            raise RuntimeError(str(why)) from why
        return json.loads(json.dumps(told))

    def close(self):
        pass


@pytest.fixture
def session(monkeypatch, tiny):
    """A session whose pairs of commits are in this process: pairs[0]["base"] is the old one."""
    monkeypatch.setattr(base, "built", lambda commit, console: base.ROOT)
    monkeypatch.setattr(base, "commit_of", lambda ref: "0123456789abcdef")
    monkeypatch.setattr(base, "PAIRS", 1)
    options = Options(
        ops=(), models=(), layers=("bert",), dtypes=("fp32",), sizes=(6,), batch=2,
        directions=("forward",), default_directions=False, budget_s=0.01,
    )  # fmt: skip
    made = base.BaseSession(options, QUIET, "before")
    monkeypatch.setattr(made, "measure_limits", lambda: None)
    made.pairs = [{"base": Here(), "fasttx": Here()}]
    monkeypatch.setattr(made, "_pairs", lambda threads: made.pairs)
    return made


def test_all_ways_of_a_layer_are_compared(session):
    run = session.execute()
    assert [row.provider for row in run.rows] == 3 * ["fasttx", "base"]
    ours = run.rows[::2]
    assert [row.case.partition(", 2 x 6, ")[2] for row in ours] == [
        layers.LABELS[name] for name in ("fasttx", "fasttx_nn", "fasttx_torch_nn")
    ]
    for row in ours:
        assert row.kind == "layer" and row.op == "bert" and row.direction == "forward"
        assert row.ok and row.ratio_to == "base" and row.ratio_low <= row.ratio <= row.ratio_high
        assert "in a process of its own" in row.notes[-1]
    assert not run.skipped


def test_what_the_other_commit_does_not_have_is_left_out(session, monkeypatch):
    monkeypatch.setattr(base_case, "ModelCase", _Older)
    run = session.execute()
    assert [row.label for row in run.rows] == ["fasttx now", "before (0123456789ab)"] * 2
    (left_out,) = run.skipped
    assert left_out["what"] == "bert layer fp32 forward 2 x 6, fasttx.nn"
    assert left_out["why"] == "before (0123456789ab) cannot run it: no such layer"


class _Older(base_case.ModelCase):
    """The first case made is that of the other commit, which lacks fasttx.nn."""

    made = 0

    def __init__(self, *arguments, **about):
        super().__init__(*arguments, **about)
        self.old = _Older.made % 2 == 0
        _Older.made += 1

    def checked(self):
        told = super().checked()
        if self.old:
            del told["ours"]["fasttx_nn"]
            told["left_out"].append("no such layer")
        return told


def test_a_wrong_answer_is_not_compared(session, monkeypatch):
    right = base_case.ModelCase.checked

    def wrong(self):
        told = right(self)
        told["ours"]["fasttx"]["verdict"] |= {"ok": False, "why": "out: far off"}
        return told

    monkeypatch.setattr(base_case.ModelCase, "checked", wrong)
    rows = session.execute().rows
    assert [row.ratio for row in rows[:2]] == [None, None]
    assert rows[0].why == "out: far off" and all(row.ratio for row in rows[2:])


def test_a_case_that_neither_can_run(session, monkeypatch):
    def fails(self):
        raise AttributeError("module 'fasttx' has no attribute 'models'")

    monkeypatch.setattr(base_case.ModelCase, "checked", fails)
    with pytest.raises(
        UsageError, match=r"nothing could be compared: bert .* no attribute 'models'"
    ):
        session.execute()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["op", "layer"])
def test_two_processes(kind, monkeypatch, tmp_path):
    """This commit beside itself, in four processes; a case that one lacks is left out."""
    monkeypatch.setattr(base, "built", lambda commit, console: base.ROOT)
    monkeypatch.setattr(base, "commit_of", lambda ref: "0123456789abcdef")
    asked = {"ops": ("call_overhead",)}
    count = len(ops.cases(ops.find("call_overhead"), "quick", ("fp32",)))
    if kind == "layer":
        pytest.importorskip("transformers", reason="transformers is not installed")
        asked, count = {"ops": (), "layers": ("t5",), "sizes": (16,)}, 2 * 2
    options = Options(**asked, models=(), dtypes=("fp32",), budget_s=0.1, command="test")
    session = base.BaseSession(options, QUIET, "before")
    run = session.execute()
    assert not session._running
    assert len(run.rows) == 2 * count
    for ours, theirs in zip(run.rows[::2], run.rows[1::2], strict=True):
        assert (ours.provider, theirs.provider) == ("fasttx", "base")
        assert ours.ratio_to == "base"
        assert ours.ratio_low <= ours.ratio <= ours.ratio_high
        assert ours.ok
        assert theirs.label == "before (0123456789ab)"
    assert any("took turns" in note for note in run.notes)
    nonsense = {"kind": "op", "op": "call_overhead", "index": 0, "name": "nonsense"}
    assert session._compare("nonsense", nonsense | {"direction": "forward"}, 1, 0.1) == []
    why = {"op": "ValueError: case 0 of call_overhead is not nonsense",
           "layer": "LookupError: it has no --seqlen"}  # fmt: skip
    told = run.skipped[-1]["why"]
    assert told == f"before (0123456789ab) cannot run it: {why[kind]}"
    assert not session._running


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
