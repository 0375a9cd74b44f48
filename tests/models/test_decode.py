"""Decoding with a cache is the forward of the whole sequence, whatever the padding."""

import random

import pytest
import torch

from fasttx import models

from .random_models import SEQ2SEQ, model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
NAMES = ("GPT2LMHeadModel", "BloomForCausalLM", "T5ForConditionalGeneration",
         "BartForConditionalGeneration", "MarianMTModel")  # fmt: skip


@pytest.fixture(params=NAMES)
def ours(request, tmp_path):
    theirs, family = model(request.param, random.Random(request.param), tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    return models.from_pretrained(tmp_path)


@torch.no_grad()
def test_step_by_step(ours):
    seq2seq = ours.config.family in SEQ2SEQ
    ids, source = torch.randint(3, 60, (3, 12)), torch.randint(3, 60, (3, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    cache = ours.new_cache(3, 12)
    if seq2seq:
        ours.start(ours.encode(source, mask), mask, cache)
        whole = ours(source, mask, decoder_input_ids=ids).logits
    else:
        whole = ours(ids).logits
    parts = [ours.decode(part, cache) for part in ids.split((5, 1, 3, 1, 2), 1)]
    torch.testing.assert_close(ours.logits(torch.cat(parts, 1)), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ours", NAMES[:2], indirect=True)
@torch.no_grad()
def test_padding_in_front(ours):
    """Each sequence of a batch, and each alone."""
    ids, start = torch.randint(3, 60, (3, 10)), torch.tensor([0, 3, 6], dtype=torch.int32)
    ids[torch.arange(10) < start[:, None]] = 0
    cache = ours.new_cache(3, 10, start)
    hidden = torch.cat([ours.decode(part, cache) for part in ids.split((7, 1, 1, 1), 1)], 1)
    for row, first in enumerate(start.tolist()):
        alone = ours(ids[row : row + 1, first:]).hidden[0]
        torch.testing.assert_close(hidden[row, first:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ours", NAMES[:2], indirect=True)
@torch.no_grad()
def test_padding_is_removed(ours):
    """A batch with padding on the right is its sequences one by one."""
    ids, mask = torch.randint(3, 60, (3, 10)), torch.ones(3, 10).long()
    mask[1, 4:], mask[2, 7:] = 0, 0
    hidden = ours(ids, mask).hidden
    for row, count in enumerate((10, 4, 7)):
        alone = ours(ids[row : row + 1, :count]).hidden[0]
        torch.testing.assert_close(hidden[row, :count], alone, rtol=1e-4, atol=1e-4)
