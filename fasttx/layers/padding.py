"""Padding taken out of a batch once, and put back at the end."""

import torch
from torch import Tensor

__all__ = ["Packing"]

# Measured: below this share of padding, gathering and scattering cost what the layers save.
_WORTH = 0.1


class Packing:
    """The real tokens of a batch [B,S,...] one after the other, [1, total, ...], and the way back.

    visible: bool [B,S], True for a real token; anywhere, not only at the front. `cu_seqlens` int32
    [B+1] bounds the sequences, as fasttx.attention takes it. Order is kept, so causal attention
    among the packed tokens is that among the padded ones.
    """

    def __init__(self, visible: Tensor):
        self.shape = visible.shape
        self.index = visible.reshape(-1).nonzero().squeeze(1)
        lengths = visible.sum(1, dtype=torch.int32)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

    @staticmethod
    def possible(visible: Tensor) -> bool:
        """Its sizes depend on values: in eager code alone."""
        return not (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or (visible.is_cuda and torch.cuda.is_current_stream_capturing())
            or torch.jit.is_tracing()
        )

    @staticmethod
    def contiguous(visible: Tensor) -> bool:
        """Whether each sequence is one run of tokens, so that distances stay what they were."""
        return bool(((visible[:, 1:] & ~visible[:, :-1]).sum(1) + visible[:, 0] <= 1).all())

    def pays(self) -> bool:
        B, S = self.shape
        return len(self.index) <= (1 - _WORTH) * B * S

    def nothing_hidden(self) -> bool:
        B, S = self.shape
        return len(self.index) == B * S

    def remove(self, x: Tensor) -> Tensor:
        """[B,S,...] -> [1, total, ...]."""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def restore(self, x: Tensor) -> Tensor:
        """[1, total, ...] -> [B,S,...], 0 at padding."""
        B, S = self.shape
        out = x.new_zeros((B * S, *x.shape[2:])).index_copy(0, self.index, x[0])
        return out.unflatten(0, (B, S))
