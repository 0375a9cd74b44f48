"""A small T5 or BART that learns pairs of texts, for the seq2seq tasks."""

import argparse
import time

import torch

import fasttx
from fasttx.training import Pairs, Result, Tokenizer, fit, generate_text

__all__ = ["trained", "written"]


def trained(
    family: str,
    sizes: dict,
    tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],
    held: list[tuple[str, str]],
    given: argparse.Namespace,
    *,
    lengths: tuple[int, int],
    learning_rate: float,
    evaluate_every: int,
) -> tuple:
    """A new model of the family, trained on the pairs and in evaluation mode; the result; CPU time.

    given: output, steps and batch_size. lengths: the most tokens of a source and of a target."""
    torch.manual_seed(0)
    model = fasttx.models.create(
        family,
        "conditional_generation",
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad,
        eos_token_id=tokenizer.eos,
        decoder_start_token_id=tokenizer.eos if family == "bart" else tokenizer.pad,
        **sizes,
    )
    start = time.process_time()
    result: Result = fit(
        model,
        Pairs(tokenizer, pairs, *lengths, cut=True),
        given.output,
        evaluation=Pairs(tokenizer, held, *lengths, cut=True),
        tokenizer=tokenizer,
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=learning_rate,
        precision="bf16",
        evaluate_every=evaluate_every,
        save_every=500,
        log_every=100,
        resume=True,
        progress=True,
    )
    seconds = time.process_time() - start
    return model.eval(), result, seconds


def written(model, tokenizer: Tokenizer, texts: list[str], rows: int, **options) -> list[str]:
    """What the model writes for each text, `rows` at a time; options are those of generate."""
    found = []
    for first in range(0, len(texts), rows):
        found += generate_text(model, tokenizer, texts[first : first + rows], **options)
    return found
