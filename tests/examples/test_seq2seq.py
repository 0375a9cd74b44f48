"""Phonemes, translation and summaries, on slices of their data that take seconds."""

import subprocess
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"


def slices(name: str) -> list[tuple[str, str]]:
    lines = (DATA / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines]


def test_phonemes_learns_a_slice(example, tmp_path, capsys):
    """Words of two letters, of which it learns at least which symbols are used."""
    pairs = [(" ".join(w), " ".join(w.upper())) for w in ("ab", "ba", "abba", "baba", "aab")] * 10
    found = example("phonemes").main(
        ["--output", str(tmp_path), "--steps", "20", "--batch-size", "8", "--held-out", "5"], pairs
    )
    assert found["loss"] < 1.5 and 0 <= found["exact"] <= 1
    assert found["letter by letter"] == 1
    assert "held-out words exactly right; letter by letter 100.0%; 20" in capsys.readouterr().out


@pytest.mark.slow
def test_the_words_are_those_of_cmudict(example):
    phonemes = example("phonemes")
    try:
        words = phonemes.words()
    except phonemes.Unavailable as why:
        pytest.skip(f"the words cannot be had: {why}")
    assert len(words) > 100_000 and words[:60] == slices("words")
    assert dict(words)["c a t"] == "K AE T"


@pytest.mark.parametrize("model", ["bart", "t5"])
def test_verses_are_learned_and_scored(model, example, tmp_path, capsys):
    """Better than words at random, and each answer scored beside those that need no model."""
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    verses = slices("verses")
    found = example("translation").main(
        ["--model", model, "--output", str(tmp_path), "--steps", "30", "--batch-size", "8",
         "--vocabulary", "400"], (verses[:6], verses[6:]),
    )  # fmt: skip
    assert found["loss"] < 5.3 < 5.99  # the logarithm of 400
    assert list(found["bleu"]) == ["most frequent", "nearest", "greedy", "beam"]
    assert all(0 <= score <= 100 for score in found["bleu"].values())
    assert "BLEU on 6 held-out verses; 30 steps" in capsys.readouterr().out


def test_what_is_held_out_is_not_trained_on(example, monkeypatch):
    translation = example("translation")
    english = {i: f"verse number {i % 20}" for i in range(40)} | {40: "a " * 30}
    spanish = {i: f"verso {i}" for i in range(41)}
    monkeypatch.setattr(translation, "king_james", lambda: english)
    monkeypatch.setattr(translation, "reina_valera", lambda: spanish)
    held, rest = translation.verses(5)
    assert len(held) == 5 and not {a for a, _ in held} & {a for a, _ in rest}
    assert len(rest) >= 30 and ("a " * 30) not in dict(rest)
    assert translation.verses(5) == (held, rest)


def test_answers_that_need_no_model(example):
    translation = example("translation")
    rest = [("the river runs", "el rio corre"), ("the cat", "el gato"), ("a cat", "el gato"),
            ("the dog", "el perro")]  # fmt: skip
    held = [("The Dog runs home", "-"), ("a cat", "-"), ("unknown", "-")]
    assert translation.most_frequent(held, rest) == ["el gato"] * 3
    near = translation.nearest(held, rest)
    assert near[:2] == ["el perro", "el gato"] and near[2] in dict(rest).values()


@pytest.mark.slow
def test_the_verses_are_those_of_the_slice(example):
    translation = example("translation")
    try:
        held, rest = translation.verses()
    except translation.Unavailable as why:
        pytest.skip(f"the verses cannot be had: {why}")
    assert len(held) == 500 and len(rest) > 11_000 and set(slices("verses")) <= set(held)


def packages(count: int) -> list[tuple[list[str], str]]:
    things = ["maps", "fonts", "mail", "games", "sound"]
    return [
        ([f"Lib{i:03d} reads {things[i % 5]} quickly. It needs no server.", "It is small."],
         f"{things[i % 5]} reader of Lib{i:03d}")
        for i in range(count)
    ]  # fmt: skip


def test_summaries_learn_a_slice(example, tmp_path, capsys):
    """Names come through as their numbers: no synopsis has another package's."""
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    made = packages(90)
    summaries = example("summaries")
    summaries.WORDS = 12
    found = summaries.main(
        ["--output", str(tmp_path), "--steps", "60", "--batch-size", "16"], (made[:10], made[10:])
    )
    assert list(found["rouge"]) == ["first sentence", "first words", "model"]
    assert found["loss"] < 1 and found["rouge"]["model"]["rouge1"] > 0.5
    assert "on 10 held-out packages; 60 steps" in capsys.readouterr().out


def test_names_are_taken_out_and_put_back(example):
    summaries = example("summaries")
    texts = summaries.Texts({"a", "library", "for", "is", "."})
    body, names = texts.body(["LibFoo is a library for OpenGL.", "Use libfoo."])
    assert body == "_0 is a library for _1 . _2 _0 ." and names == ["LibFoo", "OpenGL", "Use"]
    written = texts.synopsis("OpenGL library (fast)", names)
    assert written == "_1 library"
    assert texts.read("_1 library for _7 _0", names) == "OpenGL library for LibFoo"
    long, names = texts.body([" ".join(f"w{i}" for i in range(200))])
    assert len(long.split()) == summaries.FIRST + 1 + summaries.LAST and " | " in long
    assert len(names) == summaries.NAMES
    assert summaries.first_sentence(["It reads v1.2 files. It writes."]) == "It reads v1.2 files."
    assert summaries.first_sentence(["no end"]) == "no end"


def test_families_of_packages_stay_together(example, monkeypatch):
    summaries = example("summaries")
    found = {
        f"p{i}-{j}": (f"synopsis {i} {j}", [f"A text of number {i}, of more words than six."])
        for i in range(12)
        for j in range(3)
    }
    monkeypatch.setattr(summaries, "descriptions", lambda: found)
    held, rest = summaries.packages(4)
    assert len(held) == 4 and len(rest) == 24
    assert not {p[0] for p, _ in held} & {p[0] for p, _ in rest}


def test_translation_files_are_read(example, monkeypatch, tmp_path):
    module = example("descriptions")
    text = (
        "Package: one\nDescription-md5: 0\nDescription-en: first\n A b\n c.\n .\n  d\n\n"
        "Package: two\nDescription-md5: 1\nDescription-en: second\n Only this.\n\n"
        "Package: three\nDescription-de: dritte\n x\n"
    )
    assert module.parsed(text) == {
        "one": ("first", ["A b c.", "d"]),
        "two": ("second", ["Only this."]),
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(module.Unavailable, match="apt-get is not installed"):
        module.descriptions()
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(
        "subprocess.run", lambda c, **_: subprocess.CompletedProcess(c, 100, b"", b"no network")
    )
    with pytest.raises(module.Unavailable, match="apt-get update failed: no network"):
        module.descriptions()


def test_rouge_is_the_package_s(example):
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    found = example("summaries").scores(["the cat sat", "no"], ["the cat", "yes"])
    assert found == pytest.approx({"rouge1": 0.4, "rouge2": 1 / 3, "rougeL": 0.4})
