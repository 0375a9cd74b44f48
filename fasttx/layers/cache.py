"""The keys and values of the tokens so far, for generating one token after the other."""

import torch
from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Keys and values [layers, batch, kv_heads, max_length, head_dim], filled from the front.

    Call `advance(count)` once a step, before the layers run with `cache=cache[i]`. Nothing is
    differentiated through a cache. start: int32 [batch], the first position in use of each sequence
    (left padding); None is 0.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        start: Tensor | None = None,
        device=None,
        dtype=None,
    ):
        shape = (layers, batch, kv_heads, max_length, head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.start, self.filled = start, 0

    def advance(self, count: int) -> None:
        """Make room for the next `count` tokens of every sequence."""
        if not 0 < count <= self.keys.shape[3] - self.filled:
            raise ValueError(
                f"count must be in [1, {self.keys.shape[3] - self.filled}], the room left of "
                f"max_length {self.keys.shape[3]}, got {count}"
            )
        self.filled += count
        self.lengths += count

    def __getitem__(self, layer: int) -> "LayerCache":
        return LayerCache(self, self.keys[layer], self.values[layer])


class LayerCache:
    """One layer's part of a KVCache."""

    def __init__(self, whole: KVCache, keys: Tensor, values: Tensor):
        self.whole, self.keys, self.values = whole, keys, values
