"""docs/inspect.md: its commands and its example run, on small folders of each family."""

import re
import shlex
from pathlib import Path

import pytest

from fasttx import cli
from tests.inspect.small import ours

pytest.importorskip("transformers", reason="transformers is not installed")
TEXT = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"^    fasttx (.*)$", TEXT, re.MULTILINE)]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, id=Path(c[1]).name, marks=[] if "t5" in c[1] else [pytest.mark.slow])
        for c in COMMANDS
    ],
)
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    family = Path(command[1]).name
    ours(family, command[1], **({"num_heads": 3} if family == "t5" else {}))
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    out = capsys.readouterr()
    assert stopped.value.code == 0, out.err
    written = [Path(line) for line in out.out.splitlines() if line.endswith((".png", ".html"))]
    assert written[0].name == "index.html"
    assert all(p.is_file() for p in written)
    assert (len(written) == 8) == (family == "t5")
    own = "--patched" not in command
    title = {"gpt2": "CausalLM", "bert": "MaskedLM", "t5": "ConditionalGeneration"}.get(family)
    title = title if own else "BloomForCausalLM"
    assert f"<h1>{title}: the" in written[0].read_text()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours("gpt2", "models/gpt2")
    names = {}
    exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], names)
    out = capsys.readouterr().out
    assert "transformer.stack.layers.1.attention (2, 10, 10)" in out
    assert (tmp_path / "seen" / "index.html").is_file()
    assert abs(float(names["row"].sum()) - 1) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models/gpt2", ""], "text must not be empty"),
        (["models/gpt2", "the", "--rows", "1,x"], "--rows 1,x: give positions like 0,17,-1"),
        (["models/gpt2", "the", "--layer", "7"], "layer must lie in [0, 2), got 7"),
        (["models/gpt2", "the", "--rows", "4"], "rows must lie in [-1, 1), the tokens, got 4"),
        (["models/none", "the"], "model: models/none is not a folder"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours("gpt2", "models/gpt2")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"fasttx: {words}"
    assert not (tmp_path / "inspect").exists()
