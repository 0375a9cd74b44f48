"""Small random models of every family, ours and transformers', of the same weights, and a tokenizer
of whole words."""

import functools

import torch

import fasttx
from tests.training import tiny

TEXT = "the book was given by the teacher to the student and the student read the book"
FAMILIES = ("bert", "roberta", "gpt2", "bloom", "t5", "bart")
SEQ2SEQ = ("t5", "bart")


@functools.cache
def tokenizer():
    from fasttx.training import train_tokenizer

    return train_tokenizer("word", [TEXT] * 2, vocab_size=40)


def theirs(family: str, **changed):
    """transformers' model in eval mode, with attention far from uniform."""
    model = tiny.model(family, tokenizer(), **changed).eval()
    factor = 4 if family == "t5" else 12  # T5's logits are not divided by sqrt(head size)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and any(k in name for k in ("attn", "ttention", ".q", ".k")):
                p.mul_(factor)
    return model


def ours(family: str, folder, **changed):
    """fasttx's model of a folder with the weights of theirs."""
    theirs(family, **changed).save_pretrained(folder)
    tokenizer().save(folder)
    return fasttx.from_pretrained(folder)


def long(count: int) -> str:
    """A text of that many tokens."""
    words = TEXT.split()
    return " ".join(words[(i * i + i // 7) % len(words)] for i in range(count))
