"""`fasttx tune` and its shape classes. The clock is a fake one: no time is measured here."""

import json

import pytest
import torch
from fasttx.benchmarks import grid, ops, shape_classes, tune
from fasttx.benchmarks.stats import Interval
from rich.console import Console

import fasttx
from fasttx import choice, choice_tables, cli
from fasttx.op import OPS


class Racer:
    """An op whose backends take the times given, cycling through them, and give their outputs."""

    name, mutates, at = "racer", (), {"x": 0}

    def __init__(self, outputs=None, **times):
        self.times = {b: t if isinstance(t, list) else [t] for b, t in times.items()}
        self.outputs, self.count = outputs or {}, dict.fromkeys(times, -1)

    def __call__(self, x, backend):
        self.count[backend] += 1
        self.now = self.times[backend][self.count[backend] % len(self.times[backend])]
        return self.outputs.get(backend, x)


def run(monkeypatch, **times) -> tune.Race:
    op = Racer(**times)

    class Clock:
        name = "fake"

        def measure(self, call, inner):
            call()
            return op.now, False

    monkeypatch.setattr(tune, "clock_for", lambda device, threads: Clock())
    return tune.race(op, (torch.ones(3),), list(op.times), torch.device("cpu"), 1, "a case")


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"cpu": 1.0, "torch": 0.9}, "torch"),
        ({"cpu": 1.0, "torch": 0.98}, "cpu"),
        ({"cpu": 1.0, "torch": 1.2}, "cpu"),
        ({"cpu": 1.0, "torch": 2.0}, "cpu"),
        ({"cpu": 2.0, "torch": 1.0}, "torch"),
        ({"cpu": 1.0, "torch": [0.9, 0.9, 0.9, 1.05, 0.9, 1.1, 1.01]}, "cpu"),
        ({"triton": 1.0, "cuda": 0.8, "torch": 0.9}, "cuda"),
        ({"cpu": 1.0, "torch": [0.8] * 12 + [1.0] * 99}, "cpu"),  # the second look
    ],
)
def test_only_what_gains_is_chosen(monkeypatch, times, best):
    found = run(monkeypatch, **times)
    assert found.best == best
    assert (found.gain is not None) == (best != found.first)
    if found.gain:
        assert found.gain.low >= choice_tables.LEAST_GAIN


def test_what_does_not_agree_is_not_chosen(monkeypatch):
    for wrong in (torch.full((3,), 1.1), torch.full((3,), torch.nan)):
        found = run(monkeypatch, cpu=1.0, torch=0.1, outputs={"torch": wrong})
        assert (found.best, found.why) == ("cpu", "torch does not agree with cpu")
    endless = torch.tensor([1.0, -torch.inf, 2.0])
    assert tune.agree([endless], [endless.clone()])
    assert not tune.agree([endless], [endless.abs()])
    assert not tune.agree([endless], [])


def test_octaves():
    assert [shape_classes.octave(n) for n in (0, 1, 2, 3, 768, 1024)] == [
        [0, 0], [1, 1], [2, 3], [2, 3], [512, 1023], [1024, 2047]
    ]  # fmt: skip


def test_classes_name_arguments():
    for name, found in shape_classes.CLASSES.items():
        sizes = {key.partition(".")[0] for key in found.sizes}
        named = {*found.dtypes, *sizes, *found.values, *found.present, *found.layout}
        assert named <= set(OPS[name].at), name


@pytest.mark.parametrize("name", sorted(grid.names()))
def test_a_class_holds_the_call_that_it_describes(name, monkeypatch):
    """What is written for a call is what the choice finds for it, and for no call twice as wide."""
    seen = set()
    for op, args in tune.inner_calls(small(name), torch.device("cpu")):
        seen.add(op.name)
        entry = shape_classes.describe(op.name, args, op.at)
        choice_tables.read(json.dumps(file(ops={op.name: [entry | GAIN]})))
        found = choice._choice(entry | GAIN, table(), "", tuple(op.at))
        assert found.fits(args)
        wider = {k: [2 * low, 2 * high + 1] for k, (low, high) in entry["sizes"].items()}
        assert not choice._choice(entry | {"sizes": wider} | GAIN, table(), "", tuple(op.at)).fits(
            args
        )
    assert seen


GAIN = {"backend": "torch", "ms": {"torch": 0.1, "cpu": 0.2}, "gain": [2.0, 1.9, 2.1]}


def table(**changes) -> dict:
    versions = {"fasttx": fasttx.__version__, "torch": torch.__version__}
    return {"machine": "here", "threads": torch.get_num_threads(), **versions, "ops": {}} | changes


def file(**changes) -> dict:
    return {"schema": choice_tables.SCHEMA, "tables": [table(**changes)]}


def small(name: str):
    cases = grid.cases(name, "fp32")
    return ops.find("linear").work(3, 8, 5, "fp32", "gelu") if name == "linear" else cases[0]


@pytest.fixture
def linear(monkeypatch, tmp_path):
    """tune.execute on tiny linear cases in which "torch" wins where x has 4 rows and more."""
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTTX_TUNE", raising=False)
    monkeypatch.setattr(choice_tables, "COMMITTED", tmp_path / "none.json")
    choice_tables.write(choice_tables.COMMITTED, [])
    choice.forget()
    work, ffn = ops.find("linear").work, ops.find("ffn").work(4, "fp32", sizes=(8, 8, 8))

    def race(op, args, backends, device, threads, case):
        wins = args[0].shape[0] >= 4 and case != "7x8x5 fp32"
        seconds = {"cpu": 1.0, "torch": 0.5 if wins else 2.0}
        gain = Interval(2.0, 1.9, 2.1, 15, 0.96) if wins else None
        return tune.Race(case, "cpu", seconds, "torch" if wins else "cpu", gain)

    monkeypatch.setattr(tune, "race", race)

    def execute(*rows, names=("linear",), **changes):
        cases = {"linear": [work(n, 8, 5, "fp32") for n in rows], "ffn": [ffn]}
        options = tune.Options(
            names, ("fp32",), (torch.get_num_threads(),), cases=lambda name, _: cases[name],
            **changes,
        )  # fmt: skip
        return tune.execute(options, Console(quiet=True))

    yield execute
    monkeypatch.undo()
    choice.forget()


def backend(rows: int) -> str:
    told = fasttx.explain(fasttx.linear, torch.randn(rows, 8), torch.randn(5, 8))
    return told.chosen("linear_fwd")


def test_what_was_measured_is_used_at_once(linear):
    (found,) = linear(3, 16)
    assert {op: len(entries) for op, entries in found["ops"].items()} == {
        "linear_fwd": 1,
        "linear_bwd": 1,
    }
    assert [backend(n) for n in (3, 16, 31, 32)] == ["cpu", "torch", "torch", "cpu"]
    (entry,) = found["ops"]["linear_fwd"]
    assert entry["cases"] == ["16x8x5 fp32"]
    assert entry["ms"] == {"cpu": 1000.0, "torch": 500.0}
    assert entry["gain"] == [2.0, 1.9, 2.1]
    assert choice_tables.read_user(choice_tables.user_file()) == [found]
    linear(3)
    assert backend(16) == "cpu"


def test_one_case_that_loses_keeps_its_class_as_it_was(linear):
    linear(4, 5, 7)
    assert backend(5) == "cpu"
    linear(4, 5)
    assert backend(7) == "torch"


def test_a_dry_run_writes_nothing(linear, tmp_path):
    path = tmp_path / "deep" / "tune.json"
    assert linear(3, 16, dry_run=True, json=path)[0]["ops"]["linear_fwd"]
    told = json.loads(path.read_text())
    assert told["schema"] == "fasttx-tune/1"
    assert {(r["op"], r["case"], r["best"]) for r in told["races"]} == {
        (op, case, best)
        for op in ("linear_fwd", "linear_bwd")
        for case, best in (("3x8x5 fp32", "cpu"), ("16x8x5 fp32", "torch"))
    }
    assert not choice_tables.user_file().exists()


def test_another_file(linear, tmp_path):
    path = tmp_path / "choices.json"
    linear(16, output=path)
    assert choice_tables.read(path.read_text())[0]["commit"]
    assert not choice_tables.user_file().exists()
    path.write_text("{")
    with pytest.raises(ValueError, match="it is no JSON"):
        linear(16, output=path)
    assert path.read_text() == "{"


def test_a_damaged_file_is_written_anew(linear):
    path = choice_tables.user_file()
    path.parent.mkdir()
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="is ignored"):
        linear(16)
    assert choice_tables.read_user(path)


def test_interrupted(linear, monkeypatch, tmp_path):
    """The op under way is left out; those before it were written when they were finished."""
    first, path = tune.race, tmp_path / "tune.json"
    stopping = "linear_bwd"

    def stop(op, *args):
        if op.name == stopping:
            raise KeyboardInterrupt
        return first(op, *args)

    monkeypatch.setattr(tune, "race", stop)
    assert linear(16, json=path) == []
    assert not choice_tables.user_file().exists()
    assert [r["op"] for r in json.loads(path.read_text())["races"]] == ["linear_fwd"]
    stopping = "ffn_fwd"
    (found,) = linear(16, names=("linear", "ffn"))
    assert sorted(found["ops"]) == ["linear_bwd", "linear_fwd"]
    assert choice_tables.read_user(choice_tables.user_file()) == [found]
    assert backend(16) == "torch"


@pytest.mark.parametrize("option", ["output", "json"])
def test_a_place_that_cannot_be_written_is_told_before_measuring(
    linear, option, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tune, "race", lambda *args: pytest.fail("measured"))
    for path in (tmp_path / "file" / "choices.json", tmp_path):
        with pytest.raises(OSError, match=f"{path.name} cannot be written: "):
            linear(16, **{option: path})
    (tmp_path / "file").write_text("{")
    if option == "output":
        with pytest.raises(ValueError, match="it is no JSON"):
            linear(16, output=tmp_path / "file")


def test_a_kernel_that_changes_its_arguments_is_compared_on_copies():
    """Before any call is timed, which changes them."""
    q, angles = torch.randn(1, 2, 5, 8), torch.rand(1, 5, 8)
    args = (q.clone(), None, angles.cos(), angles.sin(), 8, False)
    found = [tune.outputs(OPS["rope_inplace"], args, b) for b in ("cpu", "torch")]
    assert tune.agree(*found)
    assert torch.equal(args[0], q)
    rope = OPS["rope_inplace"]
    told = tune.race(rope, args, ["cpu", "torch"], torch.device("cpu"), 1, "case")
    assert not told.why
    assert not torch.equal(args[0], q)


def test_residuals_may_differ_where_only_backwards_read_them():
    """Each kernel of cross_entropy takes another value near the maximum as its peak."""
    args = (torch.randn(1, 3, 4099), torch.arange(3), None, -100, 1, 0.0, 0.0)
    found = [tune.outputs(OPS["cross_entropy_fwd"], args, b) for b in ("cpu", "torch")]
    assert [t.shape for t in found[0]] == [(), (2,)]
    assert tune.agree(*found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "unknown op 'nonsense': attention"),
        (["linear", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["linear", "--threads", "4096"], "--threads must be whole numbers from 1 to"),
        (["--reset", "linear"], "--reset forgets everything"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *arguments])
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip()
    assert words in told
    assert "\n" not in told


def test_reset(linear, capsys):
    linear(16)
    assert backend(16) == "torch"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "--reset"])
    assert not stopped.value.code
    assert backend(16) == "cpu"
    assert "is gone" in capsys.readouterr().out


def test_info_tells_whose_tables_there_are(linear, monkeypatch):
    linear(16)
    told = dict(cli._choices())
    assert "entries: linear_bwd 1, linear_fwd 1" in told["yours"]
    choice_tables.user_file().write_text("{")
    choice.forget()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        choice.tables()
    assert "is ignored: it is no JSON" in dict(cli._choices())["yours"]
    monkeypatch.setenv("FASTTX_TUNE", "0")
    choice.forget()
    assert dict(cli._choices())["none"] == "FASTTX_TUNE=0 is set"
