"""Embedding, as torch.nn has it, and the first layer of a transformer: tokens, positions, segments,
norm and dropout."""

import contextlib
import math

import torch
from torch import Tensor, nn

from ..ops.embed import embed, sinusoidal_positions
from ._fit import DTYPES, dropout_p, untouched
from .norm import LayerNorm, RMSNorm

__all__ = ["Embedding", "LearnedPositions", "SinusoidalPositions", "TransformerEmbedding"]


class Embedding(nn.Embedding):
    """torch.nn.Embedding on fasttx.embed. Constructor, parameters, state_dict and errors are
    torch's; sparse, max_norm and scale_grad_by_freq run on torch."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._fits(input):
            return super().forward(input)
        try:
            return embed(input, self.weight, padding_idx=self.padding_idx)
        except ValueError:  # an index out of range, in torch's words
            return super().forward(input)

    def _fits(self, ids) -> bool:
        return (
            self.max_norm is None
            and not self.sparse
            and not self.scale_grad_by_freq
            and self.weight.dtype in DTYPES
            and isinstance(ids, Tensor)
            and ids.dtype in (torch.int64, torch.int32)
            and not ids.is_nested
            and ids.device == self.weight.device
            and not torch.overrides.has_torch_function((ids,))
        )


class LearnedPositions(nn.Embedding):
    """A learned row a position, weight [count, d_model]; the part `positions` of a
    TransformerEmbedding. reserved: rows before position 0 (BART: 2)."""

    def __init__(self, count: int, d_model: int, *, reserved: int = 0, device=None, dtype=None):
        super().__init__(count + reserved, d_model, device=device, dtype=dtype)
        self.reserved = reserved

    def table(self, count: int) -> Tensor:
        return self.weight


class SinusoidalPositions(nn.Module):
    """The fixed sines and cosines of the original transformer, for sequences of any length; nothing
    is learned or saved. interleaved: sines in even columns, else all in front (BART, Marian).
    Source: Vaswani et al., arXiv 1706.03762."""

    reserved = 0

    def __init__(
        self, d_model: int, *, count: int = 512, interleaved: bool = True, device=None, dtype=None
    ):
        super().__init__()
        self.interleaved = interleaved
        weight = sinusoidal_positions(
            count, d_model, interleaved=interleaved, device=device, dtype=dtype
        )
        self.register_buffer("weight", weight, persistent=False)

    def table(self, count: int) -> Tensor:
        """The table with at least `count` rows; it grows as it must."""
        rows, width = self.weight.shape
        if count > rows:
            # A tensor of inference mode could not be saved for a backward later.
            inference = torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inference else contextlib.nullcontext():
                self.weight = sinusoidal_positions(
                    max(count, 2 * rows),
                    width,
                    interleaved=self.interleaved,
                    device=self.weight.device,
                    dtype=self.weight.dtype,
                )
        return self.weight


class TransformerEmbedding(nn.Module):
    """dropout(norm(scale * tokens[id] + positions[p] + segments[s])), in one pass over memory.

    Args:
        vocabulary, d_model: rows and width of the token table.
        positions: LearnedPositions, SinusoidalPositions or None.
        segments: number of segments (BERT: 2), 0 for none.
        norm: LayerNorm, RMSNorm, or None.
        dropout: after the norm, in training.
        scale: of the token's row (the original transformer: sqrt(d_model)).
        padding_idx: the token whose row gets no gradient.
        padding_positions: RoBERTa's rule: positions count real tokens from padding_idx + 1.

    Parameters: tokens.weight, positions.weight, segments.weight, norm.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        *,
        positions: LearnedPositions | SinusoidalPositions | None = None,
        segments: int = 0,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
        scale: float = 1.0,
        padding_idx: int | None = None,
        padding_positions: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if padding_positions and (padding_idx is None or positions is None):
            raise ValueError("padding_positions needs padding_idx and positions, got None")
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}")
        factory = {"device": device, "dtype": dtype}
        self.tokens = Embedding(vocabulary, d_model, padding_idx=padding_idx, **factory)
        self.positions = positions
        self.segments = Embedding(segments, d_model, **factory) if segments else None
        self.norm, self.dropout = norm, nn.Dropout(dropout)
        self.scale, self.padding_positions = float(scale), padding_positions

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """input_ids [B,S] -> [B,S,d_model]. segment_ids: integers that broadcast, None is 0.
        positions: where the tokens stand, None is 0, 1, ...; offset: added to that, the tokens
        generated before."""
        places = "padding" if self.padding_positions and positions is None else positions
        table, reserved = None, 0
        if self.positions is not None:
            reserved = self.positions.reserved
            needed = input_ids.shape[-1] + offset if places is None else 0
            table = self.positions.table(needed)
        options = {}
        fused = self.norm is not None and untouched(self.norm, LayerNorm, RMSNorm)
        if fused:
            rms = type(self.norm) is RMSNorm
            eps = self.norm.eps
            options = {
                "norm_weight": self.norm.weight,
                "norm_bias": None if rms else self.norm.bias,
                "eps": torch.finfo(self.tokens.weight.dtype).eps if eps is None else eps,
                "kind": "rms" if rms else "layer",
            }
        whole = fused or self.norm is None
        out = embed(
            input_ids,
            self.tokens.weight,
            table,
            segment_ids,
            None if self.segments is None else self.segments.weight,
            positions=places,
            position_offset=offset + reserved if table is not None else 0,
            padding_idx=self.tokens.padding_idx,
            dropout_p=dropout_p(self.dropout) if whole else 0.0,
            scale=self.scale,
            **options,
        )
        return out if whole else self.dropout(self.norm(out))
