"""The keys and values of the tokens so far, for generating one token after the other."""

import torch
from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Keys and values [layers, batch, kv_heads, max_length, head_dim], filled from the front.

    Call `advance(count)` once a step, before the layers run with `cache=cache[i]`. Nothing is
    differentiated through a cache.

    start: int32 [batch], the first position in use of each sequence (left padding); None is 0.
    memory: what cross-attention looks at, a pair of keys and values a layer (CrossAttention's
    `project`), computed once; memory_mask: fasttx.attention's attn_mask for it. Both are None in a
    decoder alone. The batch may be a multiple of the memory's: neighbours share one (beams).
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
        self.memory: list[tuple[Tensor, Tensor]] | None = None
        self.memory_mask: Tensor | None = None
        self._layers = [
            LayerCache(self, *pair) for pair in zip(self.keys, self.values, strict=True)
        ]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def advance(self, count: int) -> None:
        """Make room for the next `count` tokens of every sequence."""
        if not 0 < count <= self.max_length - self.filled:
            raise ValueError(
                f"count must be in [1, {self.max_length - self.filled}], the room left of "
                f"max_length {self.max_length}, got {count}"
            )
        self.filled += count
        self.lengths += count

    def positions(self, count: int) -> Tensor:
        """int64 [batch, count]: where the newest `count` tokens, those of the last `advance`, stand
        in their sequences, padding left out; the padding itself is at 0."""
        ends = self.lengths if self.start is None else self.lengths - self.start
        places = torch.arange(-count, 0, device=ends.device)
        return (ends.long()[:, None] + places).clamp_(min=0)

    def repeat(self, times: int, max_length: int | None = None) -> "KVCache":
        """A cache with every sequence `times` times, one beside the other, and room for max_length
        tokens (None: as many as here). The memory stays one for all of them."""
        layers, batch, kv_heads, length, head_dim = self.keys.shape
        other = KVCache(
            layers,
            batch * times,
            kv_heads,
            length if max_length is None else max_length,
            head_dim,
            start=None if self.start is None else self.start.repeat_interleave(times),
            device=self.keys.device,
            dtype=self.keys.dtype,
        )
        if self.filled:
            other.advance(self.filled)
        for mine, copy in ((self.keys, other.keys), (self.values, other.values)):
            copy.unflatten(1, (batch, times))[..., : self.filled, :] = mine.unsqueeze(2)[
                ..., : self.filled, :
            ]
        other.memory, other.memory_mask = self.memory, self.memory_mask
        return other

    def reorder(self, rows: Tensor, first: int = 0) -> None:
        """Sequence i goes on from what was sequence rows[i], int64 [batch], at positions `first`
        and later; before these, and in start, the two agree already. Only sequences that change are
        copied."""
        changed = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        if not len(changed) or first >= self.filled:
            return
        sources = rows[changed]
        for held in (self.keys, self.values):
            part = held[:, :, :, first : self.filled]
            part[:, changed] = part[:, sources]

    def __getitem__(self, layer: int) -> "LayerCache":
        return self._layers[layer]


class LayerCache:
    """One layer's part of a KVCache."""

    def __init__(self, whole: KVCache, keys: Tensor, values: Tensor):
        self.whole, self.keys, self.values = whole, keys, values
