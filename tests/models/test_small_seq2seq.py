"""The small T5 and BART of tests/data/small, trained by examples/phonemes.py and translation.py:
fasttx's model, transformers' and the patched one agree on real weights, and write the same."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fasttx
from fasttx.training import Pairs, Tokenizer, generate_text

from ..integrations.hf_models import exactly, hold, output
from .test_small_models import DATA, batch, four

FILES = {"t5": "words", "bart": "verses"}


@pytest.fixture(params=FILES, scope="module")
def folder(request) -> Path:
    return DATA / "small" / request.param


def pairs(folder: Path) -> list[tuple[str, str]]:
    """Of the held-out ones."""
    lines = (DATA / f"{FILES[folder.name]}.tsv").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines]


def models(folder: Path, dtype: torch.dtype):
    return four(folder, dtype, "AutoModelForSeq2SeqLM")


def labelled(folder: Path, count: int) -> dict[str, torch.Tensor]:
    return Pairs(Tokenizer.load(folder), pairs(folder)[:count]).batch(range(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_logits(folder, dtype):
    given = labelled(folder, 6)
    labels = given.pop("labels")
    *ours, plain, exact = models(folder, dtype)
    given["decoder_input_ids"] = ours[0].transformer.shifted(labels)
    given["decoder_attention_mask"] = (labels != -100).long()
    assert not given["attention_mask"].all() and (labels == -100).any()
    plain, exact = output(plain, given), output(exact, given)
    for name, model in zip(("fasttx", "patched"), ours, strict=True):
        hold(name, output(model, given), plain, exact)


def test_loss_and_gradient(folder):
    losses, gradients = [], []
    for model in models(folder, torch.float32):
        with exactly(model):
            loss = model.train()(**labelled(folder, 40)).loss
            loss.backward()
        losses.append(loss.detach())
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)
                  and m.num_embeddings == model.config.vocab_size}  # fmt: skip
        gradients.append(tables.pop().grad)
    for found in (losses, gradients):
        *got, plain, exact = found
        for name, value in zip(("fasttx", "patched"), got, strict=True):
            hold(name, value, plain, exact)


@pytest.mark.parametrize("beams", [1, 4])
def test_the_same_words_are_written(folder, beams):
    """Token for token, by greedy and by beam search, for sources of several lengths."""
    given = batch(folder, [source for source, _ in pairs(folder)[:8]], "right")
    written = [
        model.generate(**given, max_new_tokens=32, do_sample=False, num_beams=beams)
        for model in models(folder, torch.float32)[:3]
    ]
    assert len({tuple(row) for row in written[2].tolist()}) > 4
    assert torch.equal(written[0], written[2]) and torch.equal(written[1], written[2])


@pytest.mark.parametrize("forced", [None, 2, 1709])
def test_the_last_token_is_the_one_that_the_config_forces(forced, tmp_path):
    """At the longest length; transformers' own default is not that of a folder without the key."""
    folder = DATA / "small" / "bart"
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    assert "forced_eos_token_id" not in config
    if forced is not None:
        (tmp_path / "config.json").write_text(json.dumps(config | {"forced_eos_token_id": forced}))
    given = batch(folder, [source for source, _ in pairs(folder)[:4]], "right")
    written = [
        model.generate(**given, max_new_tokens=6, do_sample=False)
        for model in models(tmp_path, torch.float32)[:3]
    ]
    assert torch.equal(written[0], written[2]) and torch.equal(written[1], written[2])
    last = set(written[0][:, -1].tolist())
    assert last == {forced} if forced is not None else last - {2}


def test_a_new_bart_forces_transformers_default(tmp_path):
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 9}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    made = fasttx.models.create("bart", "conditional_generation", **sizes, **heads)
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["forced_eos_token_id"] == 2


def test_a_target_fits_its_own_source(folder):
    """The loss with each source's own target is far below that with its neighbour's."""
    model, tokenizer = fasttx.from_pretrained(folder, dtype=torch.float32), Tokenizer.load(folder)
    held = pairs(folder)[:40]
    sources, targets = zip(*held, strict=True)
    losses = []
    for wanted in (targets, targets[1:] + targets[:1]):
        given = Pairs(tokenizer, zip(sources, wanted, strict=True)).batch(range(40))
        with torch.no_grad():
            losses.append(model(**given).loss.item())
    assert losses[1] > losses[0] + 0.5, losses


def test_words_are_said_as_they_were_when_it_was_trained():
    folder = DATA / "small" / "t5"
    model, tokenizer = fasttx.from_pretrained(folder, dtype=torch.float32), Tokenizer.load(folder)
    held = pairs(folder)
    said = generate_text(model, tokenizer, [word for word, _ in held], max_new_tokens=32)
    right = sum(a == b for a, (_, b) in zip(said, held, strict=True))
    assert right >= 0.55 * len(held), right  # 64.1 % of the 2000 that were held out
