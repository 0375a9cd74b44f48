"""fasttx train CONFIG.yaml: what it makes, and every wrong key named at once."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml

import fasttx
from fasttx import cli
from fasttx.training import ConfigError, Examples, Tokenizer, train
from fasttx.training.config import read_config

from . import corpus
from .test_loop import files, log

DOCS = (Path(__file__).parents[2] / "docs/training.md").read_text()
CONFIG = {
    "output": "run",
    "text": {"files": "text*.txt", "evaluation": 0.1},
    "tokenizer": {"kind": "word", "vocab_size": 300},
    "objective": {"name": "causal_lm", "length": 32},
    "model": {"family": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "training": {"steps": 6, "batch_size": 8, "learning_rate": "1e-3", "log_every": 2,
                 "save_every": 2},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write a text and CONFIG with sections changed; its path."""
    (tmp_path / "text1.txt").write_text("\n".join(corpus.documents(80)))
    (tmp_path / "text2.txt").write_text("\n".join(corpus.documents(80, seed=2)))

    def write(**changed):
        given = {k: dict(v) if isinstance(v, dict) else v for k, v in CONFIG.items()}
        for name, section in changed.items():
            if isinstance(section, dict):
                section = {k: v for k, v in {**given[name], **section}.items() if v != "drop"}
            given[name] = section
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v != "drop"}))
        return path

    return write


def problems(path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


def run(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *map(str, args)])
    out = capsys.readouterr()
    return stopped.value.code or 0, out.out, out.err


def test_the_command_trains_resumes_and_keeps_the_tokenizer(write, capsys, tmp_path):
    path, out = write(), tmp_path / "run"
    code, printed, errors = run(capsys, path)
    assert code == 0 and re.match(r"\S+/run/model: 6 steps, loss [\d.]+, evaluation loss", printed)
    assert "step 6/6  loss" in errors and "tokens/s" in errors
    model, tokenizer = fasttx.from_pretrained(out / "model"), Tokenizer.load(out / "model")
    assert model.config.vocab_size == tokenizer.vocab_size
    assert (out / "tokenizer/tokenizer.json").read_bytes() == (
        out / "model/tokenizer.json"
    ).read_bytes()
    known = json.loads((out / "model/config.json").read_text())["tokenizer_fingerprint"]
    assert known == tokenizer.fingerprint
    code, _, errors = run(capsys, path)
    assert code == 2 and "holds a run: go on with --resume" in errors
    code, printed, errors = run(capsys, path, "--resume", "--quiet")
    assert (code, errors) == (0, "") and "6 steps" in printed
    code, _, errors = run(capsys, write(training={"steps": 8}), "--resume")
    assert code == 2 and "is from another config:\n  steps: 6 there, 8 here" in errors
    code, _, errors = run(capsys, write(objective={"length": 24}), "--resume", "--quiet")
    assert code == 2 and "  config: " in errors and "  rows: " in errors
    path = write()
    (tmp_path / "text1.txt").write_text("\n".join(corpus.documents(80, seed=9)))
    code, _, errors = run(capsys, path, "--resume", "--quiet")
    assert code == 2 and "text: sha256:" in errors


def test_without_a_checkpoint_resume_begins_anew(write, tmp_path):
    """A run that was killed before its first one, with another tokenizer."""
    corpus.tokenizer("bpe").save(tmp_path / "run/tokenizer")
    train(write(), resume=True)
    kept = Tokenizer.load(tmp_path / "run/tokenizer")
    assert kept.fingerprint == Tokenizer.load(tmp_path / "run/model").fingerprint
    assert "WordLevel" in (tmp_path / "run/tokenizer/tokenizer.json").read_text()


def test_going_on_is_the_same_run(write, tmp_path):
    path = write()
    train(path, output=tmp_path / "whole")
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000006")
    train(path, output=tmp_path / "again", resume=True)
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    assert log(tmp_path / "again") == log(tmp_path / "whole")


def test_a_model_of_a_folder_goes_on_with_its_tokenizer(write, tmp_path):
    train(write())
    path = write(output="more", model={"folder": "run/model"} | dict.fromkeys(
        ("family", "n_embd", "n_layer", "n_head", "n_positions"), "drop"), tokenizer="drop",
    )  # fmt: skip
    train(path)
    assert (
        Tokenizer.load(tmp_path / "more/model").fingerprint
        == Tokenizer.load(tmp_path / "run/model").fingerprint
    )
    other = corpus.tokenizer("word", 60)
    other.save(tmp_path / "other")
    given = yaml.safe_load(path.read_text())
    given |= {"tokenizer": {"folder": "other"}, "output": "third"}
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        train(path)
    assert not (tmp_path / "third").exists()


def test_transformers_models_train_too(write, tmp_path):
    path = write(model={"library": "transformers", "family": "bert", "n_embd": "drop",
                        "n_layer": "drop", "n_head": "drop", "n_positions": "drop",
                        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "intermediate_size": 32, "max_position_embeddings": 40},
                 objective={"name": "masked_lm", "whole_word": True})  # fmt: skip
    train(path)
    import transformers

    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.tokenizer_fingerprint.startswith("sha256:")
    batch = tokenizer("The river keeps the <mask>, 7 times.", return_tensors="pt")
    assert model(batch.input_ids, batch.attention_mask).logits.isfinite().all()


def test_every_wrong_key_is_named_at_once(write):
    found = problems(write(
        text={"files": ["nowhere.txt", "text1.txt"], "documnts": "line", "evaluation": 3.0},
        tokenizer={"kind": "morse", "vocab_size": "many"},
        objective={"length": 2, "layuot": "flat"},
        model={"n_embd": 15, "n_heads": 3},
        training={"steps": 6, "epochs": 2.0, "batchsize": 3, "schedule": "stairs"},
        extra=3,
    ))  # fmt: skip
    for text in (
        "extra is unknown",
        "text.documnts is unknown; did you mean documents?",
        "tokenizer.kind must be 'bpe' or 'wordpiece'",
        "tokenizer.vocab_size must be an integer, got 'many'",
        "objective.layuot is unknown; did you mean layout?",
        "objective.length must be between 4 and",
        "training.batchsize is unknown; did you mean batch_size?",
        "training.schedule must be 'linear' or 'cosine' or 'constant', got 'stairs'",
    ):
        assert any(text in problem for problem in found), (text, found)
    found = problems(write(
        text={"files": ["nowhere.txt", "text1.txt"], "evaluation": 3.0},
        model={"n_embd": 15, "n_heads": 3},
        training={"steps": 6, "epochs": 2.0},
    ))  # fmt: skip
    for text in ("nowhere.txt does not exist", "evaluation must be files or a share",
                 "model: ", "training.steps or epochs must be given"):  # fmt: skip
        assert any(text in problem for problem in found), (text, found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"n_heads": 3}}, r"model\.n_heads is unknown to gpt2"),
        ({"model": {"n_positions": 16}}, r"objective\.length 32 is more than the model's 16"),
        ({"model": {"family": "gtp2"}}, r"model\.family must be one of bart, bert"),
        ({"model": {"n_embd": 1 << 20}}, r"model: about .* GB to train, and .* available"),
        ({"model": {"n_embd": 15}}, r"model: n_embd|model: .*15"),
        ({"model": {"n_layer": -1}}, r"model: .*n_layer.* at least"),
        ({"model": {"family": "bert"}}, r"model: .*(head|causal)"),
        ({"model": {"library": "transformers", "n_embd": 1 << 20}}, r"GB to train"),
        ({"model": {"library": "transformers", "n_heads": 3}}, r"model\.n_heads is unknown"),
        ({"model": {"library": "transformers", "family": "no"}}, r"transformers knows no 'no'"),
        ({"model": {"folder": "run"}}, r"model\.folder or model\.family"),
        ({"model": "drop"}, "model is missing"),
        ({"model": [1]}, r"model must be a mapping, got \[1\]"),
        ({"text": "drop", "objective": "drop", "output": "drop"}, "text is missing"),
        ({"objective": {"name": "sudoku"}}, r"objective\.name must be one of masked_lm"),
        ({"tokenizer": {"folder": "nowhere"}}, r"tokenizer\.folder cannot be given with"),
        ({"training": {"betas": [0.9]}}, r"training\.betas must be 2 numbers, got \(0\.9,\)"),
    ],
)
def test_wrong_values(changed, message, write):
    found = problems(write(**changed))
    assert any(re.search(message, problem) for problem in found), found


def test_files_that_are_no_config(write, tmp_path, capsys):
    path = write()
    path.write_text("text: [unclosed")
    assert run(capsys, path)[0] == 2
    path.write_bytes(b"caf\xe9: 1")
    assert "is not YAML" in run(capsys, path)[2]
    path.write_text("- 1")
    assert "must be a mapping of output, text" in run(capsys, path)[2]
    code, _, errors = run(capsys, tmp_path / "none.yaml")
    assert code == 2 and "none.yaml: cannot be read" in " ".join(errors.split("\n  "))


def test_text_smaller_than_a_batch_and_text_that_is_not_utf8(write, tmp_path, capsys):
    path = write(training={"batch_size": 4096})
    code, _, errors = run(capsys, path)
    assert code == 2 and "fewer than one batch of 4096" in errors
    (tmp_path / "text2.txt").write_bytes(b"fine\n\xff\xfe\n")
    code, _, errors = run(capsys, path)
    assert code == 2 and "text2.txt: line 2: byte 0xff at offset 5 is not UTF-8" in errors
    (tmp_path / "text2.txt").write_text("")
    code, _, errors = run(capsys, path)
    assert code == 2 and "text2.txt is empty" in errors
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_code_and_a_checkpoint(number, code, write, capsys, monkeypatch):
    own = Examples.batch

    def batch(self, indices, epochs=0):
        if len(indices) == 8 and isinstance(indices, list):
            signal.raise_signal(number)
        return own(self, indices, epochs)

    monkeypatch.setattr(Examples, "batch", batch)
    found, _, errors = run(capsys, write())
    assert found == code and f"{number.name}: saved step 1; go on with --resume" in errors
    monkeypatch.undo()
    assert run(capsys, write(), "--resume")[0] == 0


def test_a_nan_ends_with_code_1(write, capsys):
    code, _, errors = run(capsys, write(training={"learning_rate": 1e3, "steps": 200, "clip": None,
                                                  "weight_decay": 900.0}))  # fmt: skip
    assert code == 1 and "try a smaller learning_rate" in errors and "Traceback" not in errors


def test_the_documented_config_runs_and_writes_text(tmp_path, monkeypatch, capsys):
    config = re.search(r"```yaml\n(.*?)```", DOCS, re.DOTALL)[1]
    assert "steps: 2000" in config and "save_every: 200" in config
    monkeypatch.chdir(tmp_path)
    Path("verses.txt").write_text("\n".join(corpus.documents(300)))
    Path("verses.yaml").write_text(config.replace("2000", "4").replace("_every: 200", "_every: 2"))
    train("verses.yaml")
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    for block in blocks:
        torch.manual_seed(0)
        exec(block, {"__name__": "docs"})
    assert Path("runs/own/checkpoints/step-00000020").is_dir()
    assert capsys.readouterr().out


def test_every_option_is_documented():
    from dataclasses import fields

    from fasttx.training import TrainOptions

    for field in fields(TrainOptions):
        assert re.search(rf"\b{field.name}\b", TrainOptions.__doc__), field.name
