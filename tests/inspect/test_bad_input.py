"""A clear error before the model runs."""

import pytest
import torch

import fasttx
from fasttx.inspect import load, look
from tests.inspect.small import TEXT, long, ours, theirs, tokenizer

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = ours("gpt2", tmp_path_factory.mktemp("gpt2"))
    model.forward = None  # running it would be another error
    return model


@pytest.mark.parametrize(
    ("text", "options", "error", "words"),
    [
        ("", {}, ValueError, "text must not be empty"),
        (" \n", {}, ValueError, "text must not be empty"),
        (b"the", {}, TypeError, "text must be a str, got bytes"),
        (long(65), {}, ValueError, "at most 64 tokens, the model's positions, got 65"),
        (TEXT, {"layer": 2}, ValueError, r"layer must lie in \[0, 2\), got 2"),
        (TEXT, {"head": -1}, ValueError, r"head must lie in \[0, 2\), got -1"),
        (TEXT, {"rows": [3, 16]}, ValueError, r"rows must lie in \[-16, 16\), the tokens, got 16"),
        (TEXT, {"rows": ["a"]}, TypeError, "rows must hold ints, got 'a'"),
        (TEXT, {"top_k": 0}, ValueError, "top_k must be an int of at least 1, got 0"),
        (TEXT, {"target": "the"}, ValueError, "target must be None for CausalLM"),
    ],
)
def test_errors_name_the_argument(model, text, options, error, words):
    with pytest.raises(error, match=words):
        look(model, tokenizer(), text, **options)


def test_texts_without_positions_have_a_limit_too(tmp_path):
    model = ours("bloom", tmp_path)
    model.forward = None
    with pytest.raises(ValueError, match="at most 16384 tokens, the most that is shown"):
        look(model, tokenizer(), "the " * 16385)


def test_more_rows_than_a_page_holds(tmp_path):
    model = ours("bloom", tmp_path, n_layer=2, n_head=4)
    model.forward = None
    with pytest.raises(ValueError, match="rows must be at most 196 for 6000 tokens, got 300"):
        look(model, tokenizer(), long(6000), rows=list(range(300)))


def test_models_that_cannot_be_looked_at():
    with pytest.raises(TypeError, match="got Linear"):
        look(torch.nn.Linear(2, 2), tokenizer(), TEXT)
    with pytest.raises(ValueError, match=r"needs fasttx.patch\(model\) first"):
        look(theirs("gpt2"), tokenizer(), TEXT)


def test_folders(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)
    ours("gpt2", tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load(tmp_path / "a")


def test_a_tokenizer_of_another_model(tmp_path):
    model = ours("gpt2", tmp_path)
    other = fasttx.training.train_tokenizer("bpe", [TEXT], vocab_size=300)
    with pytest.raises(fasttx.training.TokenizerMismatch, match="another tokenizer"):
        look(model, other, TEXT)
