"""generate against transformers' own on the same weights, token for token."""

import random

import pytest
import torch

from fasttx import models

from .random_models import model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
QUICK, ALL = 6, 60
NAMES = (
    "GPT2LMHeadModel",
    "BloomForCausalLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "MarianMTModel",
)


def configurations():
    for name in NAMES:
        for seed in range(ALL):
            marks = () if seed < QUICK else pytest.mark.slow
            yield pytest.param(name, seed, marks=marks, id=f"{name}-{seed}")


def prompts(rng: random.Random, side: str, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    length = rng.choice((2, 5, 9))
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ids = torch.randint(3, 60, (rows, length), generator=g)
    if rng.random() < 0.3:
        return ids, None
    sizes = torch.tensor([length, *(rng.randint(1, length) for _ in range(rows - 1))])[:, None]
    at = torch.arange(length)
    mask = at >= length - sizes if side == "left" else at < sizes
    return ids.masked_fill(~mask, 0), mask.long()


def options(rng: random.Random) -> dict:
    """Ends often: several of the 61 tokens are end tokens."""
    ends = rng.choice((60, [60, 7], [4, 9, 15, 33, 48], []))
    given = {
        "max_new_tokens": rng.choice((1, 4, 12)),
        "eos_token_id": ends,
        "pad_token_id": rng.choice((1, 0)),
        "do_sample": False,
    }
    if rng.random() < 0.6:
        given |= {
            "num_beams": rng.choice((2, 3, 5)),
            "length_penalty": rng.choice((1.0, 0.0, 2.0, -1.0, 0.7)),
            "early_stopping": rng.choice((False, True, "never")),
        }
    extra = {
        "repetition_penalty": rng.choice((1.3, 0.8)),
        "no_repeat_ngram_size": rng.choice((1, 2, 3)),
        "min_length": rng.choice((3, 12)),
        "min_new_tokens": rng.choice((1, 6)),
        "forced_bos_token_id": 11,
        "forced_eos_token_id": 60,
    }
    return given | {n: v for n, v in extra.items() if rng.random() < 0.25}


def theirs_of(options: dict) -> dict:
    """An empty list of end tokens is None there."""
    return {n: None if v == [] else v for n, v in options.items()}


@pytest.mark.parametrize(("name", "seed"), list(configurations()))
def test_tokens_are_transformers_own(name, seed, tmp_path):
    rng = random.Random(f"generate {name} {seed}")
    fixed = {"eos_token_id": None, "forced_eos_token_id": None}
    if name.startswith("T5"):  # transformers' cache takes the encoder's layers for the decoder's
        fixed["num_decoder_layers"] = None
    theirs, family = model(name, rng, **fixed)
    if rng.random() < 0.5:
        theirs.set_attn_implementation("eager")
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(tmp_path)
    ours = models.from_pretrained(tmp_path)
    for _ in range(3):
        side = "left" if family in ("gpt2", "bloom") else "right"
        ids, mask = prompts(rng, side, rng.choice((1, 3)))
        given = options(rng)
        if "no_repeat_ngram_size" in given:
            mask = torch.ones_like(ids)  # transformers counts n-grams of padding
        visible = torch.ones_like(ids) if mask is None else mask
        expected = theirs.generate(ids, attention_mask=visible, **theirs_of(given))
        got = ours.generate(ids, mask, **given)
        assert torch.equal(got, expected), f"{given}\n{got}\n{expected}"
