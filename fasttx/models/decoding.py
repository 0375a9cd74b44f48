"""A model one step after the other: the prompt without its padding, the logits after it and after
each new token, from a recorded step."""

import os

import torch
from torch import Tensor

from ..layers import SinusoidalPositions
from .heads import BaseModel
from .replay import record

__all__ = ["Decoder", "align", "grow_positions"]

# Steps that must be left for a recording, which costs a few of them, to pay.
WORTH_RECORDING = 8


def align(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The real tokens of each row at its end, in their order, [B,P] with P the most that a row has,
    and the first of each as int32 [B], or None where every row has P."""
    if attention_mask is None:
        return input_ids, None
    visible = attention_mask.bool()
    counts = visible.sum(1)
    fewest, most = counts.aminmax()
    if int(fewest) == 0:
        raise ValueError(
            f"attention_mask must show a token in every row, got none in row {int(counts.argmin())}"
        )
    if int(fewest) == visible.shape[1]:
        return input_ids, None
    order = visible.to(torch.uint8).argsort(stable=True, dim=1)[:, -int(most) :]
    start = None if fewest == most else (most - counts).to(torch.int32)
    return input_ids.gather(1, order), start


class Decoder:
    """model and cache: decoder(tokens [B,S]) advances by S tokens and gives the logits of the next,
    [B, vocabulary] in the model's dtype; `left` is how many steps may follow.

    Steps of one token are recorded once, as a CUDA graph on a GPU and as a Recording on a CPU, and
    made again from then on: their logits are then the same memory every time. FASTTX_GRAPH=0 turns
    that off; what cannot be recorded, and models with hooks, run as they did.
    """

    def __init__(self, model, cache, left: int = 0):
        self.model, self.cache = model, cache
        self.eager_steps, self.replay = 0, None
        self.may_record = (
            os.environ.get("FASTTX_GRAPH", "1") != "0"
            and isinstance(model, BaseModel)
            and left >= WORTH_RECORDING
            and not torch._C._len_torch_dispatch_stack()
            and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.replay is not None:
            if self.cache.filled >= self.cache.max_length:
                raise ValueError(f"the cache holds no more than {self.cache.max_length} tokens")
            self.tokens.copy_(tokens)
            self.cache.filled += 1
            return self.replay()
        if self.may_record and tokens.shape[1] == 1:
            return self._record(tokens)
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        hidden = self.model.decode(tokens, self.cache)
        return self.model.logits(hidden[:, -1])

    def _record(self, tokens: Tensor) -> Tensor:
        cache = self.cache
        if cache.start is None:  # positions are then counted in a tensor
            cache.start = torch.zeros_like(cache.lengths)
        self.tokens = tokens.clone()
        if not tokens.is_cuda:
            self.may_record = False
            logits, recording = record(lambda: self._run(self.tokens))
            self.replay = None if recording is None else recording.run
            return logits
        self.eager_steps += 1
        if self.eager_steps <= 2:  # kernels are compiled and loaded
            return self._run(tokens)
        self.may_record = False
        filled, graph = cache.filled, torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                logits = self._run(self.tokens)
        except RuntimeError:
            cache.filled = filled
            return self._run(tokens)
        self.graph = graph
        graph.replay()

        def replay():
            graph.replay()
            return logits

        self.replay = replay
        return logits


def grow_positions(model, length: int) -> None:
    """Tables that grow do so now: neither in a recorded step, nor in inference mode, whose tensors
    no training could use later."""
    for module in model.modules():
        if isinstance(module, SinusoidalPositions):
            module.table(length)
