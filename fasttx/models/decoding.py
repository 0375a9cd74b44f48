"""A model one step after the other: the prompt without its padding, the logits after it and after
each new token, from a CUDA graph on a GPU."""

import os

import torch
from torch import Tensor

__all__ = ["Decoder", "align"]


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
    float32 or the model's dtype, [B, vocabulary].

    On a GPU the third call of one token is captured as a CUDA graph and those that follow replay
    it: a step costs one launch. FASTTX_CUDA_GRAPH=0 turns that off, and so does a capture that
    fails. The logits are then the same memory every time.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps, self.may_capture = 0, _may_capture(cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.graph is not None:
            return self._replay(tokens)
        if tokens.shape[1] == 1 and self.may_capture:
            self.eager_steps += 1
            if self.eager_steps > 2:
                self._capture(tokens)
                if self.graph is not None:
                    return self._replay(tokens)
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        hidden = self.model.decode(tokens, self.cache)
        return self.model.logits(hidden[:, -1])

    def _capture(self, tokens: Tensor) -> None:
        self.tokens, graph = tokens.clone(), torch.cuda.CUDAGraph()
        filled = self.cache.filled
        try:
            with torch.cuda.graph(graph):
                self.logits = self._run(self.tokens)
            self.graph = graph
        except RuntimeError:
            self.may_capture = False
        finally:  # recording is not running
            self.cache.filled = filled

    def _replay(self, tokens: Tensor) -> Tensor:
        if self.cache.filled >= self.cache.max_length:
            raise ValueError(f"the cache holds no more than {self.cache.max_length} tokens")
        self.tokens.copy_(tokens)
        self.cache.filled += 1
        self.graph.replay()
        return self.logits


def _may_capture(cache) -> bool:
    return (
        cache.lengths.is_cuda
        and os.environ.get("FASTTX_CUDA_GRAPH", "1") != "0"
        and not torch.cuda.is_current_stream_capturing()
    )
