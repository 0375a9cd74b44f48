"""The small decoders of tests/data/small, trained on King James by examples/king_james.py: fasttx's
model, transformers' and the patched one agree on real weights, and write the same."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fasttx
from fasttx.training import Tokenizer, generate_text, log_likelihood

from ..integrations.hf_models import exactly, hold, output

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
DATA = Path(__file__).parents[1] / "data"
FAMILIES = ("gpt2", "bloom")
PSALMS = (DATA / "king_james.txt").read_text(encoding="utf-8").strip().split("\n\n")
HELD_OUT = PSALMS[9]  # Psalm 12, of examples/king_james.py's held-out chapters


@pytest.fixture(params=FAMILIES, scope="module")
def folder(request) -> Path:
    return DATA / "small" / request.param


def four(folder: Path, dtype: torch.dtype, auto: str = "AutoModelForCausalLM"):
    """(fasttx's, patched, transformers' own, that in float64), of the same weights."""
    theirs = getattr(transformers, auto).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    patched, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    fasttx.patch(patched, strict=True)
    return fasttx.from_pretrained(folder, dtype=dtype), patched, theirs, exact


def batch(folder: Path, texts: list[str], side: str) -> dict[str, torch.Tensor]:
    tokenizer = Tokenizer.load(folder)
    rows = [tokenizer.prompt(text) for text in texts]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tokenizer.pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        part = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, part], mask[i, part] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_logits(folder, dtype, side):
    given = batch(folder, [*HELD_OUT.split("\n")[:5], HELD_OUT[:600], "The"], side)
    assert not given["attention_mask"].all()
    *got, plain, exact = (output(model, given) for model in four(folder, dtype))
    for name, logits in zip(("fasttx", "patched"), got, strict=True):
        hold(name, logits, plain, exact)


def test_loss_and_gradient(folder):
    given = batch(folder, PSALMS[8:11], "right")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    losses, gradients = [], []
    for model in four(folder, torch.float32):
        with exactly(model):
            loss = model.train()(**given, labels=labels).loss
            loss.backward()
        losses.append(loss.detach())
        (table,) = (m for m in model.modules() if isinstance(m, nn.Embedding)
                    and m.num_embeddings == model.config.vocab_size)  # fmt: skip
        gradients.append(table.weight.grad)
    for found in (losses, gradients):
        *got, plain, exact = found
        for name, value in zip(("fasttx", "patched"), got, strict=True):
            hold(name, value, plain, exact)


@pytest.mark.parametrize("beams", [1, 4])
def test_the_same_words_are_written(folder, beams):
    """Token for token, prompts of several lengths."""
    prompts = ["And God said,", "The", "Blessed is the man that walketh not in the counsel of"]
    given = batch(folder, prompts, "left")
    written = [
        model.generate(**given, max_new_tokens=40, do_sample=False, num_beams=beams)
        for model in four(folder, torch.float32)[:3]
    ]
    assert written[0].shape[1] > given["input_ids"].shape[1]
    assert torch.equal(written[0], written[2]) and torch.equal(written[1], written[2])


def test_it_knows_the_language(folder):
    """Nats a character of a psalm it never saw (measured: 1.02, 1.00; reversed 1.87)."""
    model, tokenizer = fasttx.from_pretrained(folder, dtype=torch.float32), Tokenizer.load(folder)
    words = HELD_OUT.split()
    texts = [HELD_OUT, " ".join(reversed(words))]
    whole, reverse = (-log_likelihood(model, tokenizer, texts).total / len(HELD_OUT)).tolist()
    assert whole < 1.1 and reverse > 1.6
    (text,) = generate_text(model, tokenizer, "And God said", max_new_tokens=20)
    assert text.isascii() and len(text.split()) > 8


def test_it_is_saved_as_it_was(folder, tmp_path):
    fasttx.from_pretrained(folder).save_pretrained(tmp_path)
    old, new = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_the_small_models_stay_small():
    for folder in (DATA / "small").iterdir():
        assert sum(path.stat().st_size for path in folder.iterdir()) < 3.5e6, folder.name
        assert "python examples/" in (folder / "README.md").read_text(), folder.name
