"""python -m benchmarks.gpu as far as it goes without a GPU: items, isolation, record, report."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fasttx.benchmarks.gpu import __main__ as command
from fasttx.benchmarks.gpu import commands, report, speed, tune
from fasttx.benchmarks.gpu.isolate import Worker
from fasttx.benchmarks.gpu.record import Item, Record, RecordError
from fasttx.kernels import tiles

MACHINE = {
    "cpu": "a", "commit": "abc", "python": "3.11", "packages": {"torch": "2", "triton": "3"},
}  # fmt: skip


def item(name: str, seconds: float = 30.0, **arguments) -> Item:
    function = f"tests.benchmarks.gpu_items:{name}"
    return Item("test", f"test/{name}", function, arguments, f"do {name}", seconds)


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.stop()


def test_a_fault_takes_its_process_and_not_the_run(worker):
    first = worker.run(item("double", x=4))
    same = worker.run(item("double", x=5))
    assert first.status == "ok" and first.result["y"] == 8
    assert same.result["process"] == first.result["process"]
    died = worker.run(item("die"))
    assert (died.status, died.message) == ("failed", "the process died with exit code 7")
    late = worker.run(item("sleep", seconds=0.2))
    assert (late.status, late.message) == ("failed", "no answer in 0 s")
    poisoned = worker.run(item("fail", text="CUDA error: an illegal memory access"))
    assert poisoned.status == "failed" and "illegal memory access" in poisoned.message
    fresh = worker.run(item("double", x=1))
    assert fresh.status == "ok" and fresh.result["process"] != first.result["process"]
    kept = worker.run(item("fail", text="a plain fault"))
    again = worker.run(item("double", x=1))
    assert kept.status == "failed" and again.result["process"] == fresh.result["process"]


def test_refusals_and_partial_failures(worker):
    refused = worker.run(item("refuse"))
    assert (refused.status, refused.message) == ("refused", "Device not supported")
    partly = worker.run(item("partly"))
    assert partly.status == "failed" and partly.result == {"done": 3}
    assert partly.failures[0]["reproduce"] == "try one"


def test_the_record_is_resumed(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    items = [item("double", x=1), item("fail", text="no")]
    left = command.execute(items, Record(path, MACHINE), seconds=-1)
    assert left == items and not path.exists()
    assert not command.execute(items[:1], Record(path, MACHINE), seconds=60)
    before = path.read_text()
    record = Record(path, MACHINE)
    assert command.execute(items, record, seconds=-1) == items[1:]
    assert path.read_text() == before
    command.execute(items, record, seconds=60)
    assert {k: o["status"] for k, o in json.loads(path.read_text())["items"].items()} == {
        "test/double": "ok", "test/fail": "failed",
    }  # fmt: skip
    text = report.markdown(record, [])
    assert "| test | 1 | 1 | 0 | 0 |" in text and "`do fail`" in text
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"items": {}}', '{"machine": {"commit": 1}}'])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(RecordError, match="is no record of fasttx-gpu/1"):
        Record(tmp_path / "gpu.json", MACHINE)


def test_a_record_of_another_commit_is_refused(tmp_path):
    path = tmp_path / "gpu.json"
    Record(path, MACHINE).write()
    with pytest.raises(RecordError, match="made at commit abc, this is xyz: give --again"):
        Record(path, MACHINE | {"commit": "xyz"})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "fly"], "--only must be of build, test, sanitize, tune, bench, got 'fly'"),
        (["--only", ""], "--only must be of"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--adopt"], "--adopt needs --out"),
    ],
)
def test_wrong_use_is_one_line(arguments, text, capsys):
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_one_line(capsys):
    assert command.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_every_item_is_there_once_and_can_be_repeated():
    items = [i for make in command.PARTS.values() for i in make()]
    keys = [i.key for i in items]
    assert len(set(keys)) == len(keys)
    assert all(i.reproduce and i.seconds <= 600 for i in items)
    assert {"test/gpu_cuda", "test/test_attention", "sanitize/racecheck", "bench/limits"} <= set(
        keys
    )
    assert json.dumps([i.arguments for i in items])


def test_failures_of_pytest_keep_their_line(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="tests.ops.test_x" name="test_a[triton]"/>'
        '<testcase classname="tests.ops.test_x" name="test_b[1]"><failure message="off by 3"/>'
        '</testcase><testcase classname="tests.ops.test_x" name="test_c"><skipped message="no"/>'
        "</testcase></testsuite></testsuites>"
    )
    found = commands.parse_junit(path, {"FASTTX_TEST_DEVICE": "cuda"})
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["backends"] == ["triton"]
    assert found["failures"] == [
        {
            "what": "tests/ops/test_x.py::test_b[1]",
            "message": "off by 3",
            "reproduce": "FASTTX_TEST_DEVICE=cuda python -m pytest "
            "'tests/ops/test_x.py::test_b[1]'",
        }
    ]


def test_what_passed_is_remembered(tmp_path):
    record = Record(tmp_path / "gpu.json", MACHINE | {"gpu": "Card"})
    for op, status in (("rope", "ok"), ("softmax", "failed")):
        outcome = command.Outcome("test", status, 1.0, "line", result={"backends": ["triton"]})
        record.add(f"test/test_{op}", outcome)
    path = tmp_path / "runs.json"
    path.write_text('{"embed": {}}')
    commands.remember(record, path)
    runs = json.loads(path.read_text())
    assert set(runs) == {"embed", "rope"}
    assert runs["rope"]["triton"]["card"] == "Card" and runs["rope"]["triton"]["commit"] == "abc"


def test_pytest_that_runs_nothing_is_a_failure(monkeypatch):
    monkeypatch.setattr(commands, "_workers", list)
    with pytest.raises(RuntimeError, match="no test ran"):
        commands.run_tests(["tests/gpu/test_calls.py", "-k", "nothing_of_this_name"], {})


def test_a_missing_sanitizer_is_a_failure(monkeypatch):
    monkeypatch.setattr(commands.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="compute-sanitizer is not on the PATH"):
        commands.sanitize(commands.sanitizers()[0].arguments["command"], {})


@pytest.mark.parametrize(
    ("output", "code", "status"),
    [
        ("========= Device not supported. Please refer", 1, "refused"),
        ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("========= ERROR SUMMARY: 2 errors", 77, "failed"),
        ("1 passed", 0, "failed"),
    ],
)
def test_what_a_sanitizer_says(output, code, status, monkeypatch):
    done = commands.subprocess.CompletedProcess([], code, output)
    monkeypatch.setattr(commands.shutil, "which", lambda name: name)
    monkeypatch.setattr(commands, "_run", lambda *a, **k: done)
    try:
        found = ("ok", commands.sanitize(["compute-sanitizer"], {}))
    except commands.Refused:
        found = ("refused", None)
    except RuntimeError:
        found = ("failed", None)
    assert found[0] == status


@pytest.mark.filterwarnings("ignore:.*SDPA.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*attention.*:UserWarning")
@pytest.mark.parametrize("bias", [None, "alibi", "relative"])
def test_a_row_of_attention(bias, monkeypatch):
    monkeypatch.setattr(speed, "backends", lambda device: ["cpu", "torch"])
    found = speed.attention(
        64, 32, True, bias, device="cpu", tokens=128, width=64, dtype="fp32", seconds=0.05
    )
    row = found["rows"]["fasttx cpu"]
    assert row["forward"]["tflops"] > 0 and row["backward"]["tflops"] > 0
    assert not found["failures"]
    if bias is None:
        assert "sdpa cudnn" in found["refused"] and max(row["error"]) < 1e-5
        assert max(found["rows"]["sdpa flash"]["error"]) < 1e-5
    else:
        assert "fasttx without bias" in found["rows"]


def test_a_wrong_kernel_is_told(monkeypatch):
    import fasttx

    monkeypatch.setattr(speed, "backends", lambda device: ["cpu"])
    right = fasttx.attention
    monkeypatch.setattr(fasttx, "attention", lambda *a, **k: right(*a, **k) * 1.01)
    found = speed.attention(
        64, 32, False, device="cpu", tokens=64, width=64, dtype="fp32", seconds=0.05
    )
    assert found["failures"][0]["what"].startswith("fasttx cpu")


def test_every_candidate_can_be_launched():
    for kernel in tune.KERNELS:
        for itemsize in (2, 4):
            found = tune.candidates(kernel, "sm90", itemsize, 128, frozenset({"band"}))
            assert len(found) > 5
            for tile in found:
                used = tiles.shared_bytes(kernel, "sm90", tile, itemsize, 128, frozenset())
                assert used <= tiles.SHARED_BYTES["sm90"]


@pytest.mark.parametrize(("tile", "answer"), [([64, 64, 4, 2], ""), ([48, 64, 4, 2], "does not")])
def test_a_candidate_compiles_as_it_would_be_launched(tile, answer):
    """In a process of its own: this one's kernels are the interpreter's."""
    code = (
        "from fasttx.benchmarks.gpu.tune import _compile_one\n"
        f"print(_compile_one(('sm90', 'fwd/16/64/light', {tile}, 'fwd', 2, 64, 'light')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip().startswith(answer) and bool(done.stdout.strip()) == bool(answer)


def test_adopted_tiles_are_picked(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "TUNED", tmp_path / "tuned.json")
    tune.TUNED.write_text("{}")
    result = {
        "key": "fwd/16/64/light", "arch": "sm90", "used": [128, 64, 8, 2], "used_us": 20.0,
        "best": [64, 128, 4, 3], "best_us": 10.0, "gain": 2.0, "workload": "w", "card": "c",
    }  # fmt: skip
    record = Record(tmp_path / "gpu.json", MACHINE)
    slow = dict(result, key="rows/16/64/light", gain=1.01)
    for name, r in (("fwd", result), ("rows", slow)):
        record.add(f"tune/{name}", command.Outcome("tune", "ok", 1.0, "line", result=r))
    assert tune.adopt(record.path).startswith("1 tiles written")
    table = json.loads(tune.TUNED.read_text())
    assert table["sm90"]["fwd/16/64/light"]["instead_of_us"] == 20.0
    monkeypatch.setattr(tiles, "tuned", lambda: table)
    tiles.pick_tile.cache_clear()
    picked = tiles.pick_tile("fwd", "sm90", 2, 64, 4096, 4096, frozenset({"band"}))
    tiles.pick_tile.cache_clear()
    assert picked == tiles.Tile(64, 128, 4, 3)
    assert "| fwd/16/64/light | [128, 64, 8, 2] | 20.0 |" in report.markdown(record, [])


def test_a_trial_is_over_when_it_is_over():
    before = tiles.pick_tile("fwd", "sm90", 2, 64, 4096, 4096)
    with tiles.trial("fwd/16/64/light", tiles.Tile(32, 32, 4, 1)):
        assert tiles.pick_tile("fwd", "sm90", 2, 64, 4096, 4096) == tiles.Tile(32, 32, 4, 1)
    assert tiles.pick_tile("fwd", "sm90", 2, 64, 4096, 4096) == before
