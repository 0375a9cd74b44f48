"""What README.md shows is what happens."""

import re
import shlex
from pathlib import Path

import pytest

import fasttx
from fasttx import cli
from tests.models.test_docs import FOLDERS
from tools import support_table

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_attention_example_runs():
    example = next(
        code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "q, k" in code
    )
    # The shapes shown are worth timing; here the same lines run small.
    names = {}
    exec(example.replace("(8, 12, 512, 64,", "(1, 12, 16, 64,"), names)
    assert names["out"].shape == (1, 12, 16, 64)
    assert names["q"].grad is not None


def test_other_ops_example_runs():
    example = next(
        code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "add_norm" in code
    )
    names = {}
    exec(example, names)
    assert names["vocabulary"].grad is not None
    assert names["out"].shape == (1, 4, 1, 64)


MODELS = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "models/" in code]


def test_there_is_an_example_of_each_family():
    named = set(re.findall(r'"models/(\w+)"', "".join(MODELS)))
    assert {"bert", "roberta", "gpt2", "bloom", "t5", "bart"} <= named


@pytest.mark.parametrize("number", range(len(MODELS)))
def test_model_examples_run(number, tmp_path, monkeypatch, capsys):
    """On small folders of each family, with a tokenizer of the README's own words."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    monkeypatch.chdir(tmp_path)
    tokenizer = fasttx.training.train_tokenizer("bpe", TEXT.splitlines(), vocab_size=300)
    for family in set(re.findall(r'"models/(\w+)"', MODELS[number])) & set(FOLDERS):
        head, options = FOLDERS[family]
        options = options | {"vocab_size": 300, "n_positions": 64, "max_position_embeddings": 64}
        fasttx.models.create(family, head, **options).save_pretrained(f"models/{family}")
        tokenizer.save(f"models/{family}")
    exec(MODELS[number], {})
    assert capsys.readouterr().out


def test_commands_run(capsys):
    commands = [
        shlex.split(line)[1:] for line in re.findall(r"^    (fasttx .*)$", TEXT, re.MULTILINE)
    ]
    assert {command[0] for command in commands} == {"info", "explain", "bench"}
    for command in commands:
        if command[0] == "bench":  # run by tests/benchmarks; here its options are known
            options = [word for word in command if word.startswith("--")]
            with pytest.raises(SystemExit) as stopped:
                cli.main([*command[:2], "--help"])
            text = capsys.readouterr().out
            assert stopped.value.code == 0
            assert [option for option in options if option not in text] == []
        else:
            with pytest.raises(SystemExit) as stopped:
                cli.main(command)
            assert stopped.value.code == 0


def test_paths_exist():
    for path in re.findall(r"^\| `([\w/.]+)` \|", TEXT, re.MULTILINE):
        if not path.isupper():
            assert (ROOT / path).exists(), path


def test_variables_are_those_of_info():
    table = TEXT.partition("## Environment variables")[2].partition("##")[0]
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", table))
    assert set(cli.ENVIRONMENT) <= listed


@pytest.mark.parametrize("page", list(support_table.TABLES))
def test_ops_tables_are_generated(page):
    """To refresh them: python -m tools.support_table"""
    assert support_table.parts((ROOT / page).read_text())[1] == support_table.TABLES[page]()
