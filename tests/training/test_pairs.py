"""Pairs of texts for seq2seq models."""

import pytest

import fasttx
from fasttx.training import Pairs, fit, generate_text, train_tokenizer

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
