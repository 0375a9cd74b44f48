"""King James and zero-shot answers, on twenty psalms."""

import math
import random
from collections import Counter
from pathlib import Path

import pytest

SLICE = Path(__file__).parents[1] / "data" / "king_james.txt"
TINY = ["--steps", "30", "--batch-size", "4", "--vocab-size", "400"]


@pytest.fixture(scope="module")
def psalms() -> list[str]:
    return SLICE.read_text(encoding="utf-8").strip().split("\n\n")


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_slice_is_learned_and_asked(family, example, psalms, tmp_path, capsys):
    """Better than the frequencies of characters after seconds; the folder answers questions."""
    language = example("king_james")
    found = language.main(["--family", family, "--output", str(tmp_path), *TINY], psalms)
    rest, held = language.parted(psalms)
    assert len(psalms) == 20 and held == [psalms[9]] and len(rest) == 19
    counts = Counter("".join(rest))
    share = {c: n / counts.total() for c, n in counts.items()}
    characters = -sum(math.log(share[c]) for c in held[0]) / len(held[0])
    assert found["nats"] < characters < 3.1
    printed = capsys.readouterr().out
    assert all(f"{prompt}|" in printed for prompt in language.PROMPTS)
    assert "nats a character of 778 held out, xz " in printed and "; 30 steps" in printed
    asked = ["--model", str(tmp_path / "model"), "--text", "I will praise thee,",
             "--answers", " O LORD", " xylophone"]  # fmt: skip
    answers = example("zero_shot").main(asked)
    assert answers[" O LORD"] > 0.9 and sum(answers.values()) == pytest.approx(1)


def test_the_tasks_are_what_they_say(example):
    zero_shot = example("zero_shot")
    verses = [
        "And Moses said, Aaron is not Aaronic.",
        "Solomon, behold",
        "the house of (Jacob) stood",
        "no name at all",
    ]
    prompts, answers, right = zero_shot.names(verses)
    assert prompts == ["", "the house of ("] and [zero_shot.NAMES[r] for r in right] == [
        "Solomon",
        "Jacob",
    ]
    for prompt, row, r, verse in zip(prompts, answers, right, verses[1:], strict=False):
        assert prompt + row[r] == verse
        assert len(set(row)) == len(zero_shot.NAMES)
    draw = random.Random(1)
    verses = [" ".join(f"w{draw.randrange(99)}" for _ in range(n)) for n in (14, 12, 11, 13, 20)]
    prompts, answers, right = zero_shot.continuations(verses, choices=3)
    long = [verse for verse in verses if len(verse.split()) >= 12]
    assert [p + a[r] for p, a, r in zip(prompts, answers, right, strict=True)] == long
    assert all(len(set(row)) == 3 for row in answers)
    assert zero_shot.continuations(verses, choices=3) == (prompts, answers, right)


def test_both_tasks_are_measured_beside_their_baselines(example, psalms, monkeypatch, capsys):
    """A judge that knows the answers gets all of them."""
    import torch

    zero_shot = example("zero_shot")
    verses = [verse for psalm in psalms for verse in psalm.split("\n")]

    def judge(model, tokenizer, prompts, answers, **_):
        known = set(verses)
        return torch.tensor(
            [[float(p + a in known) for a in row] for p, row in zip(prompts, answers, strict=True)]
        )

    monkeypatch.setattr(zero_shot, "zero_shot", judge)
    found = zero_shot.measure(None, None, verses)
    assert found["names"] == found["continuations"] == 1
    assert 0.1 <= found["most frequent"] <= 1 and found["without the verse"] < 0.5
    printed = capsys.readouterr().out
    assert "names: 100.0% of" in printed and "chance 25.0%" in printed


def test_a_text_without_answers_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example("zero_shot").main(["--text", "And he said"])
    assert "--text and --answers go together" in capsys.readouterr().err
