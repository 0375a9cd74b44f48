"""What changes the scores of the next token before one is chosen, in transformers' order and to the
same numbers: repetition penalty, no repeated n-grams, minimum lengths, forced first and last
token."""

import math

import torch
from torch import Tensor

from .generation_options import Options

__all__ = ["ScoreRules"]


class ScoreRules:
    """rules(scores [R,V] float32, ids [R,n]) -> scores of the same shape.

    ids: what is there already, prompt and new tokens, real tokens at the end of each row. start:
    the first real token of each row, int [R], or None. length: of the prompt as it was given, for
    min_length and the forced last token. An instance is false where no rule applies.
    """

    def __init__(self, options: Options, length: int, start: Tensor | None):
        self.options, self.length, self.start = options, length, start
        self.least = options.min_new_tokens
        if self.least is None:
            self.least = options.min_length - length

    def __bool__(self) -> bool:
        o = self.options
        return (
            o.repetition_penalty != 1.0
            or o.no_repeat_ngram_size > 0
            or (self.least > 0 and bool(o.eos_token_id))
            or o.forced_bos_token_id is not None
            or bool(o.forced_eos_token_id)
        )

    def __call__(self, scores: Tensor, ids: Tensor, new: int) -> Tensor:
        """new: how many of the ids were generated."""
        o = self.options
        if o.repetition_penalty != 1.0:
            scores = self._penalized(scores, ids)
        if 0 < o.no_repeat_ngram_size <= ids.shape[1]:
            scores = self._without_repeats(scores, ids)
        if new < self.least and o.eos_token_id:
            scores = scores.clone()
            scores[:, [i for i in o.eos_token_id if i < scores.shape[1]]] = -math.inf
        if self.length + new == 1 and o.forced_bos_token_id is not None:
            scores = _only(scores, [o.forced_bos_token_id])
        if new == o.max_new_tokens - 1 and o.forced_eos_token_id:
            scores = _only(scores, list(o.forced_eos_token_id))
        return scores

    def _hidden(self, ids: Tensor) -> Tensor | None:
        if self.start is None:
            return None
        return torch.arange(ids.shape[1], device=ids.device) < self.start[:, None]

    def _penalized(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Source: Keskar et al., arXiv 1909.05858."""
        hidden = self._hidden(ids)
        if hidden is not None:  # once more the newest token, which is there anyway
            ids = torch.where(hidden, ids[:, -1:], ids)
        penalty, found = self.options.repetition_penalty, scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))

    def _without_repeats(self, scores: Tensor, ids: Tensor) -> Tensor:
        n, vocabulary = self.options.no_repeat_ngram_size, scores.shape[1]
        windows = ids.unfold(1, n, 1)
        prefix = ids[:, ids.shape[1] + 1 - n :]
        repeats = (windows[..., :-1] == prefix[:, None]).all(-1)
        hidden = self._hidden(ids)
        if hidden is not None:
            repeats &= ~hidden[:, : windows.shape[1]]
        banned = scores.new_zeros(scores.shape[0], vocabulary + 1, dtype=torch.bool)
        banned.scatter_(1, torch.where(repeats, windows[..., -1], vocabulary), True)
        return scores.masked_fill(banned[:, :vocabulary], -math.inf)


def _only(scores: Tensor, ids: list[int]) -> Tensor:
    scores = torch.full_like(scores, -math.inf)
    scores[:, ids] = 0
    return scores
