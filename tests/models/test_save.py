"""A save is whole or not there: killed, out of space, over a folder that holds other things."""

import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch

import fasttx
from fasttx import models

SMALL = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}


def make(seed: int, **options):
    torch.manual_seed(seed)
    return models.create("gpt2", "causal_lm", **{**SMALL, **options})


def tokens(folder) -> torch.Tensor:
    return fasttx.from_pretrained(folder).transformer.embedding.tokens.weight


def test_it_takes_the_place_of_the_old_one(tmp_path):
    folder = tmp_path / "model"
    make(0).save_pretrained(folder, max_shard_bytes=20_000)
    (folder / "tokenizer.json").write_text("kept")
    (folder / "link").symlink_to("tokenizer.json")
    (folder / "pytorch_model.bin").write_text("stale")
    new = make(1, n_layer=1)
    new.save_pretrained(folder)
    assert torch.equal(tokens(folder), new.transformer.embedding.tokens.weight)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["config.json", "link", "model.safetensors", "tokenizer.json"]
    assert (folder / "link").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_folders(tmp_path):
    (tmp_path / "model" / "runs").mkdir(parents=True)
    (tmp_path / "model" / "runs" / "log").write_text("kept")
    for seed in (0, 1):
        make(seed).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "runs" / "log").read_text() == "kept"
    assert torch.equal(tokens(tmp_path / "model"), make(1).transformer.embedding.tokens.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make(0).save_pretrained(tmp_path / "link")
    make(1).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()


def test_who_may_read(tmp_path):
    before = os.umask(0o022)
    try:
        make(0).save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()}
    assert modes == {"config.json": 0o644, "model.safetensors": 0o644}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("step", ["_write_json", "_write_weights", "_take_place", "_flush"])
def test_what_fails_leaves_the_old_folder(step, tmp_path, monkeypatch):
    from fasttx.models import save

    make(0).save_pretrained(tmp_path / "model")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, step, full)
    for folder in ("model", "new"):
        with pytest.raises(OSError, match="No space left"):
            make(1).save_pretrained(tmp_path / folder)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert torch.equal(tokens(tmp_path / "model"), make(0).transformer.embedding.tokens.weight)


def test_no_words_for_it(tmp_path):
    model = make(0)
    model.config = replace(model.config, embedding_norm=True, eps=0.5)
    with pytest.raises(ValueError, match="no words for the changed"):
        model.save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be a folder or new, got the file"):
        make(0).save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="max_shard_bytes must be None or at least 1"):
        make(0).save_pretrained(tmp_path / "new", max_shard_bytes=0)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed(tmp_path):
    """Killed at any moment, the folder is one of the two that were saved, whole."""
    folder, rng, seen = tmp_path / "model", random.Random(0), set()
    made = [make(0, vocab_size=20000, n_embd=240, n_layer=n) for n in (1, 2)]
    for n, model in enumerate(made):
        for p in model.parameters():
            p.data.fill_(n)
    made[0].save_pretrained(folder)
    for _ in range(20):
        child = os.fork()
        if not child:
            while True:
                for model in reversed(made):
                    model.save_pretrained(folder)
        time.sleep(rng.random() * 0.3)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        model = fasttx.from_pretrained(folder)
        (value,) = {p.unique().item() for p in model.parameters()}
        assert model.config.layers == value + 1
        seen.add(value)
    assert seen == {0, 1}
