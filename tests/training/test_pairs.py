"""Pairs of texts for seq2seq models."""

import re
import textwrap
from pathlib import Path

import pytest
import yaml

import fasttx
from fasttx.training import (
    ConfigError,
    Pairs,
    Tokenizer,
    fit,
    generate_text,
    train,
    train_tokenizer,
)
from fasttx.training.pairs import parted, read_pairs

from .test_loop import files
from .test_models import create

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("word", [" ".join([*NUMBERS, *"0123456789"])], 40, min_frequency=1,
                           template="eos")  # fmt: skip


def pairs():
    return [(f"{i} {j}", f"{NUMBERS[i]} {NUMBERS[j]}") for i in range(10) for j in range(10)]


def test_batches_hold_both_texts(tokenizer):
    batch = Pairs(tokenizer, [("1 2 3", "one"), ("4", "four five")]).batch([0, 1])
    eos, pad = tokenizer.eos, tokenizer.pad
    ids = [tokenizer.encode(t) for t in ("1 2 3", "4", "one", "four five")]
    assert batch["input_ids"].tolist() == [[*ids[0], eos], [*ids[1], eos, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[*ids[2], eos, -100], [*ids[3], eos]]


def test_a_small_t5_learns_to_read_numbers(tokenizer, tmp_path):
    model = create("t5", "conditional_generation", tokenizer, dropout_rate=0.0)
    fit(model, Pairs(tokenizer, pairs()), tmp_path, steps=250, batch_size=25, learning_rate=5e-3,
        tokenizer=tokenizer)  # fmt: skip
    model = fasttx.from_pretrained(tmp_path / "model")
    asked = pairs()[::9]
    written = generate_text(model, tokenizer, [a for a, _ in asked], max_new_tokens=4)
    assert sum(w == b for w, (_, b) in zip(written, asked, strict=True)) >= len(asked) - 1


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "there are none"),
        ([("1", "one"), ("", "two")], {}, r"the source of pair 1 is empty: ''"),
        ([("1", " "), ("2", "")], {}, r"the target of pair 0 is empty: ' ', and 1 more"),
        ([("1 2 3 4", "one")], {"length": 4}, "source of pair 0 has more than 3 tokens"),
        ([("1", "one")], {"target_length": 1}, "target_length must be at least 2, got 1"),
    ],
)
def test_what_is_refused(given, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        Pairs(tokenizer, given, **options)
    if "has more" in message:
        batch = Pairs(tokenizer, given, **options, cut=True).batch([0])
        assert batch["input_ids"].shape == (1, 4)


CONFIG = {
    "output": "run",
    "pairs": {"files": "numbers.tsv", "evaluation": 0.1, "length": 8, "target_length": 6},
    "tokenizer": {"kind": "word", "vocab_size": 60, "min_frequency": 1},
    "model": {"family": "t5", "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32,
              "num_layers": 1},
    "training": {"steps": 4, "batch_size": 16, "save_every": 2},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write numbers.tsv and CONFIG with sections changed; its path."""
    lines = [f"{source}\t{target}" for source, target in pairs()]
    (tmp_path / "numbers.tsv").write_text("\n".join(lines) + "\n\n")

    def write(**changed):
        given = {name: dict(v) if isinstance(v, dict) else v for name, v in CONFIG.items()}
        for name, section in changed.items():
            given[name] = {**given.get(name, {}), **section}
        path = tmp_path / "numbers.yaml"
        path.write_text(yaml.safe_dump(given))
        return path

    return write


def test_a_file_of_pairs_trains_evaluates_and_goes_on(write, tmp_path):
    path = write()
    whole = train(path, output=tmp_path / "whole")
    assert whole.steps == 4 and whole.evaluation_loss is not None
    tokenizer = Tokenizer.load(tmp_path / "whole/model")
    assert tokenizer.encode("7 seven") == [tokenizer.backend.token_to_id(t) for t in ("7", "seven")]
    assert tokenizer.prompt("7")[-1] == tokenizer.eos
    train(path, output=tmp_path / "again")
    last = tmp_path / "again/checkpoints/step-00000004"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    train(path, output=tmp_path / "again", resume=True)
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    (tmp_path / "numbers.tsv").write_text("\n".join(f"{a}\t{b} zero" for a, b in pairs()))
    with pytest.raises(ConfigError, match="text: sha256:"):
        train(path, output=tmp_path / "again", resume=True)


def test_pairs_of_a_bart_and_files_to_evaluate_on(write, tmp_path):
    (tmp_path / "held.tsv").write_text("1 2\tone two\r\n")
    path = write(pairs={"evaluation": ["held.tsv"]})
    given = yaml.safe_load(path.read_text())
    given["model"] = {"family": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
                      "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                      "max_position_embeddings": 8}  # fmt: skip
    path.write_text(yaml.safe_dump(given))
    assert train(path).evaluation_loss > 0
    given["model"]["max_position_embeddings"] = 7
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(ConfigError, match=r"pairs\.length 8 is more than the model's 7 positions"):
        train(path, output=tmp_path / "other")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pairs": {"files": "nowhere.tsv"}}, r"pairs\.files: \S+nowhere\.tsv does not exist"),
        ({"pairs": {"evaluation": 2.0}}, "pairs.evaluation must be files or a share between 0"),
        ({"pairs": {"lenght": 3}}, "pairs.lenght is unknown; did you mean length?"),
        ({"pairs": {"length": 1}}, "pairs.length must be at least 2, got 1"),
        ({"pairs": {"cut": "yes"}}, "pairs.cut must be true or false"),
        ({"text": {"files": "numbers.tsv"}}, "pairs cannot be given with text"),
        ({"objective": {"name": "causal_lm"}}, "pairs cannot be given with objective"),
        ({"model": {"family": "gpt2"}}, r"model: head must be one of .* for gpt2"),
    ],
)
def test_configs_that_are_refused(changed, message, write, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(write(**changed))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nno tab\n", r"line 2 must be source<TAB>target, got 'no tab'"),
        (b"a\tb\tc\n", "line 1 must be"),
        (b"a\t \n", "line 1 must be"),
        (b"\n\n", "there are no pairs"),
        (b"a\tb\n\xff\tc\n", "line 2: byte 0xff at offset 4 is not UTF-8"),
    ],
)
def test_files_that_are_no_pairs(content, message, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_a_share_is_held_out_by_seed():
    rest, held = parted(pairs(), 0.2, seed=3)
    assert len(held) == 20 and sorted(rest + held) == sorted(pairs())
    assert parted(pairs(), 0.2, seed=3) == (rest, held) != parted(pairs(), 0.2, seed=4)
    with pytest.raises(ValueError, match=r"cannot part 0\.5 of 1 pairs"):
        parted([("a", "b")], 0.5)


def test_the_documented_config_trains(tmp_path):
    docs = (Path(__file__).parents[2] / "docs/training.md").read_text()
    found = re.search(r"^    output: runs/numbers\n(?:    .*\n)+", docs, re.MULTILINE)[0]
    given = yaml.safe_load(textwrap.dedent(found))
    given["training"] |= {"steps": 1, "batch_size": 8}
    (tmp_path / "numbers.yaml").write_text(yaml.safe_dump(given))
    (tmp_path / "numbers.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs()))
    assert train(tmp_path / "numbers.yaml").steps == 1
