"""Beam search, to the tokens of transformers 5.23: its candidates, ties, length penalty, early
stopping and filling."""

import torch
from torch import Tensor

from .generation_options import Options
from .scores import ScoreRules

__all__ = ["beam_search"]

_NEVER = -1.0e9


class Hypotheses:
    """The best `beams` finished sequences of each sentence, by score / length ** length_penalty.

    sequences [B,K,L], scores [B,K], lengths [B,K] (new tokens) and finished [B,K]; improvable [B,1]
    says whether a running beam may still enter.
    """

    def __init__(self, running: Tensor, options: Options):
        B, K, _ = running.shape
        self.options, self.sequences = options, running.clone()
        self.scores = torch.full((B, K), _NEVER, device=running.device)
        self.lengths = torch.zeros((B, K), dtype=torch.int64, device=running.device)
        self.finished = torch.zeros((B, K), dtype=torch.bool, device=running.device)
        self.improvable = torch.ones((B, 1), dtype=torch.bool, device=running.device)

    def add(self, sequences: Tensor, scores: Tensor, ended: Tensor, new: int) -> None:
        """Candidates [B,C,L] of `new` tokens, those that ended among their first K."""
        K = self.options.num_beams
        ended = ended & (torch.arange(ended.shape[1], device=ended.device) < K)
        scores = scores / new**self.options.length_penalty
        full = self.finished.all(1, keepdim=True) & (self.options.early_stopping is True)
        for reason in (full, ~self.improvable, ~ended):
            scores = scores + reason.float() * _NEVER
        every = torch.cat((self.scores, scores), 1)
        best = every.topk(K)[1]
        self.scores = every.gather(1, best)
        self.sequences = rows_of(torch.cat((self.sequences, sequences), 1), best)
        lengths = torch.full_like(ended, new, dtype=torch.int64)
        self.lengths = torch.cat((self.lengths, lengths), 1).gather(1, best)
        self.finished = torch.cat((self.finished, ended), 1).gather(1, best)

    def judge(self, running_scores: Tensor, new: int) -> None:
        """Whether the best running beam, of `new` tokens, could still be better than the worst
        finished sequence."""
        o = self.options
        length = new
        if o.early_stopping == "never" and o.length_penalty > 0:
            length = o.max_new_tokens
        best = running_scores[:, :1] / length**o.length_penalty
        worst = torch.where(self.finished, self.scores.min(1, keepdim=True)[0], _NEVER)
        self.improvable &= (best > worst).any(-1, keepdim=True)

    def open(self) -> bool:
        done = self.finished.all() & (self.options.early_stopping is True)
        return bool(self.improvable.any() & ~done)


def rows_of(x: Tensor, indices: Tensor) -> Tensor:
    """x [B,C,L] at indices [B,K]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))


@torch.no_grad()
def beam_search(step, prompt: Tensor, ids: Tensor, start, options: Options) -> Tensor:
    """The best sequence of each sentence, [B, S + new tokens].

    step(tokens [B * K, 1], rows): logits float32 [B * K, V] of the next token, where row i goes on
    from row rows[i] of the last step; step(None, None): those after the prompt. prompt: [B,S], put
    in front of what is returned; ids, start: the real tokens of the prompt, [B,P], and the first of
    each row or None.
    """
    B, S = prompt.shape
    K, eos, N = options.num_beams, options.eos_token_id, options.max_new_tokens
    P, device = ids.shape[1], ids.device
    # As transformers fills: a pad_token_id of 0 counts as none.
    fill = (options.pad_token_id or eos[0]) if eos else -1
    kept = max(2, 1 + len(eos)) * K
    running = torch.full((B, K, P + N), fill, dtype=torch.int64, device=device)
    running[..., :P] = ids[:, None]
    found = Hypotheses(running, options)
    scores = torch.zeros((B, K), device=device)
    scores[:, 1:] = _NEVER  # the first step chooses among the tokens of one beam
    repeated = None if start is None else start.repeat_interleave(K)
    rules = ScoreRules(options, S, repeated)
    stop = torch.tensor(eos, device=device) if eos else None
    offset = torch.arange(0, B * K, K, device=device)[:, None]
    tokens = rows = None
    for new in range(N):
        log_probs = step(tokens, rows).log_softmax(-1)
        if rules:
            log_probs = rules(log_probs, running[..., : P + new].flatten(0, 1), new)
        vocabulary = log_probs.shape[1]
        total = (log_probs.view(B, K, vocabulary) + scores[..., None]).view(B, K * vocabulary)
        best, places = total.topk(min(kept, K * vocabulary))
        beams, chosen = places // vocabulary, places % vocabulary
        candidates = rows_of(running, beams)
        candidates[..., P + new] = chosen
        last = new == N - 1
        ended = torch.full_like(chosen, last, dtype=torch.bool)
        if stop is not None:
            ended |= torch.isin(chosen, stop)

        going = best + ended.float() * _NEVER
        top = going.topk(K)[1]
        running, scores = rows_of(candidates, top), going.gather(1, top)
        found.add(candidates, best, ended, new + 1)
        found.judge(scores, new + 1)
        if last or bool(ended.all()) or not found.open():
            break
        tokens = running[..., P + new].reshape(-1, 1)
        rows = (beams.gather(1, top) + offset).flatten()
    longest = int(found.lengths[:, 0].max())
    return torch.cat((prompt, found.sequences[:, 0, P : P + longest]), 1)
