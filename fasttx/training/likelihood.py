"""How likely a causal language model finds a text, and answers chosen by that."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import CausalLM
from ..ops.cross_entropy import cross_entropy
from .batches import is_seq2seq
from .objectives import padded
from .tokenizer import Tokenizer, check_tokenizer

__all__ = ["Likelihood", "log_likelihood", "zero_shot"]

NORMALIZE = ("none", "tokens", "characters", "prior")


class Likelihood(NamedTuple):
    """total float64 [N]: ln P(text | prompt), in nats; tokens int64 [N]: the terms of each sum."""

    total: Tensor
    tokens: Tensor


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    prompts: str | Sequence[str] = "",
    *,
    ends: bool = False,
    length: int | None = None,
    batch_size: int = 16,
) -> Likelihood:
    """ln P(text | prompt) = sum_i ln P(token_i | bos, prompt, tokens before i).

    model is a causal language model, fasttx's or transformers', and runs in eval mode.

    A text and what stands before it are tokenized together where the prompt's tokens are then the
    first ones, and apart where they are not ("un" + "til"): let a text begin with its space.

    Args:
        texts: N of them. prompts: one each, or one for all; the tokenizer's bos comes first.
        ends: also that eos follows the text.
        length: the longest context, in tokens; by default the model's number of positions. Of
            what is longer each token sees at least half of that: windows overlap by half.
        batch_size: windows at a time.

    Raises:
        TokenizerMismatch: the model was trained with another tokenizer.
        ValueError: naming the argument: a text of no tokens, nothing before the first token, a
            model that is not a causal language model.
    """
    check_tokenizer(model, tokenizer)
    if is_seq2seq(model):
        raise ValueError(f"model must be a causal language model, got {type(model).__name__}")
    if isinstance(texts, str):
        raise ValueError("texts must be several texts, got one str: give [text]")
    prompts = [prompts] * len(texts) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(texts):
        raise ValueError(f"prompts must be one or {len(texts)} like texts, got {len(prompts)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if ends and tokenizer.eos is None:
        raise ValueError("ends=True needs a tokenizer with the token eos")
    longest = _positions(model)
    length = longest if length is None else length
    if length is not None and (length < 2 or (longest is not None and length > longest)):
        raise ValueError(f"length must be between 2 and {longest or 'any'}, got {length}")
    rows = [_tokens(tokenizer, p, t, ends) for p, t in zip(prompts, texts, strict=True)]
    windows = [
        (number, *window)
        for number, (ids, first) in enumerate(rows)
        for window in _windows(ids, first, length)
    ]
    windows.sort(key=lambda window: len(window[1]))
    total = torch.zeros(len(rows), dtype=torch.float64)
    with _evaluating(model):
        for start in range(0, len(windows), batch_size):
            part = windows[start : start + batch_size]
            losses = _losses(model, tokenizer, [(ids, first) for _, ids, first in part])
            total.index_add_(0, torch.tensor([number for number, _, _ in part]), -losses)
    return Likelihood(total, torch.tensor([len(ids) - first for ids, first in rows]))


def zero_shot(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    answers: Sequence[str] | Sequence[Sequence[str]],
    *,
    normalize: str = "none",
    prior: str = "",
    length: int | None = None,
    batch_size: int = 16,
) -> Tensor:
    """float64 [N, A]: how well each answer goes on from each prompt; its argmax is the choice, its
    softmax (where nothing is normalized) the probabilities among these answers.

    Args:
        prompts: N texts. answers: A texts for all, or A for each prompt; with the space that parts
            them from a prompt.
        normalize: "none", ln P(answer | prompt); "tokens" and "characters", that divided by the
            answer's number of them, so that short answers have no advantage; "prior",
            ln P(answer | prompt) - ln P(answer | prior), so that common ones have none.
        prior: what stands before an answer without saying anything about it.
        length, batch_size: see log_likelihood.

    Raises TokenizerMismatch and ValueError as log_likelihood, and ValueError for answers that are
    not as many for each prompt.

    Source: Brown et al., arXiv 2005.14165 (lengths); Holtzman et al., 2104.08315 (prior).
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of texts, got {prompts!r}")
    shared = bool(answers) and all(isinstance(answer, str) for answer in answers)
    each = [answers] * len(prompts) if shared else answers
    counts = {len(given) for given in each}
    if isinstance(answers, str) or len(each) != len(prompts) or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"answers must be texts, or as many of them for each of the {len(prompts)} prompts"
        )
    given = {"length": length, "batch_size": batch_size}
    texts = [answer for row in each for answer in row]
    before = [prompt for prompt, row in zip(prompts, each, strict=True) for _ in row]
    found = log_likelihood(model, tokenizer, texts, before, **given)
    scores = found.total
    if normalize == "tokens":
        scores = scores / found.tokens
    elif normalize == "characters":
        scores = scores / torch.tensor([len(text) for text in texts])
    elif normalize == "prior":
        different = list(dict.fromkeys(texts))
        alone = log_likelihood(model, tokenizer, different, prior, **given).total
        place = {text: i for i, text in enumerate(different)}
        scores = scores - alone[[place[text] for text in texts]]
    return scores.view(len(prompts), -1)


def _positions(model: nn.Module) -> int | None:
    """How many tokens the model can place, None for any."""
    name = "max_positions" if isinstance(model, CausalLM) else "max_position_embeddings"
    return getattr(model.config, name, None)


def _tokens(tokenizer: Tokenizer, prompt: str, text: str, ends: bool) -> tuple[list[int], int]:
    """(the ids of bos, prompt, text and eos, where the text's begin)."""
    before, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    if ids[: len(before)] != before:
        ids = before + tokenizer.encode(text)
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    ids, first = start + ids + [tokenizer.eos] * ends, len(start) + len(before)
    if len(ids) == first:
        raise ValueError(f"texts must each have a token, got {text!r}")
    if first == 0:
        raise ValueError("prompts must each have a token where the tokenizer has no bos")
    return ids, first


def _windows(ids: list[int], first: int, length: int | None) -> Iterable[tuple[list[int], int]]:
    """(ids of at most `length`, where those that are counted begin): each from `first` on once."""
    while first < len(ids):
        stop = len(ids) if length is None else min(len(ids), max(length, first + (length + 1) // 2))
        start = 0 if length is None else max(0, stop - length)
        yield ids[start:stop], first - start
        first = stop


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _losses(model: nn.Module, tokenizer: Tokenizer, rows: list[tuple[list[int], int]]) -> Tensor:
    """float64 [len(rows)]: -ln P of each row's ids from its first on; logits of those alone."""
    device = next(model.parameters()).device
    pad = 0 if tokenizer.pad is None else tokenizer.pad
    ids = padded([row for row, _ in rows], pad)
    place = torch.arange(ids.shape[1])
    sizes = torch.tensor([len(row) for row, _ in rows])[:, None]
    counted = (place >= torch.tensor([first for _, first in rows])[:, None]) & (place < sizes)
    predicts = counted[:, 1:].to(device)
    given = {"input_ids": ids.to(device), "attention_mask": (place < sizes).long().to(device)}
    if isinstance(model, CausalLM):
        logits = model.logits(model(**given, logits=False).hidden[:, :-1][predicts])
    else:
        logits = model(**given, use_cache=False).logits[:, :-1][predicts]
    targets = ids.to(device)[:, 1:][predicts]
    losses = cross_entropy(logits.float(), targets, reduction="none")
    row = torch.arange(len(rows), device=device)[:, None].expand_as(predicts)[predicts]
    total = torch.zeros(len(rows), dtype=torch.float64, device=device)
    return total.index_add_(0, row, losses.double()).cpu()
