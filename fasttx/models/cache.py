"""What a model remembers while it generates."""

import torch
from torch import Tensor

from ..layers import KVCache

__all__ = ["Cache"]


class Cache(KVCache):
    """A KVCache, and for a seq2seq model the keys and values of the memory: `memory`, one pair a
    layer, and `memory_mask` bool [B,1,1,T] or None."""

    memory: list[tuple[Tensor, Tensor]] | None = None
    memory_mask: Tensor | None = None

    def positions(self, count: int) -> Tensor | None:
        """Where the newest `count` tokens stand, [B,count], counted from each sequence's start;
        None where no sequence has one."""
        if self.start is None:
            return None
        newest = torch.arange(count, device=self.lengths.device) - count
        return (newest + (self.lengths - self.start)[:, None]).clamp_(min=0)

    def reorder(self, rows: Tensor) -> None:
        """Sequence b becomes what sequence rows[b] was; rows int64 [B]."""
        used = self.filled
        for values in (self.keys, self.values):
            values[..., :used, :] = values[:, rows, :, :used]
        self.lengths = self.lengths[rows]
        self.start = None if self.start is None else self.start[rows]
        if self.memory is not None:
            self.memory = [(k[rows], v[rows]) for k, v in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask[rows]
