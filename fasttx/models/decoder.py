"""Decoders: GPT-2, BLOOM, and the second half of T5 and BART."""

import torch
from torch import Tensor, nn

from ..layers import KVCache
from . import parts
from .config import Config

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """Token ids to hidden states, a token seeing itself and those before it, and with `cross` a
    memory.

    Parts: embedding, position_bias (BLOOM, T5) and stack.
    """

    def __init__(self, config: Config, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.embedding = parts.embedding(config, factory)
        self.position_bias = parts.position_bias(config, factory, decoder=True)
        cross = config.topology == "seq2seq"
        self.stack = parts.stack(config, factory, decoder=True, cross=cross)
        self.dropout = nn.Dropout(config.dropout if config.final_dropout else 0.0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B,S] to [B,S,d_model]. attention_mask [B,S], 1 or True for real tokens;
        memory [B,T,d_model] and memory_mask [B,T] of a seq2seq model. cu_seqlens: bounds of packed
        sequences in one row, as fasttx.attention takes them, with their position_ids."""
        limit = self.config.limit() if position_ids is None else None
        parts.check_ids("input_ids", input_ids, limit)
        parts.check_mask("attention_mask", attention_mask, input_ids)
        places = None if self.embedding.positions is None else position_ids
        x = self.embedding(input_ids, positions=places)
        given = {}
        if memory is not None:
            given = {"memory": memory, "memory_mask": parts.key_mask(memory_mask)}
        if cu_seqlens is not None:
            if attention_mask is not None or position_ids is None or memory is not None:
                raise ValueError(
                    "cu_seqlens needs position_ids, and attention_mask and memory to be None"
                )
            given["cu_seqlens"] = cu_seqlens
        bias = parts.bias_of(self.position_bias, attention_mask)
        x = self.stack(x, padding_mask=attention_mask, position_bias=bias, **given)
        return self.dropout(x)

    def new_cache(self, batch: int, length: int, start: Tensor | None = None) -> KVCache:
        """An empty cache for `batch` sequences of at most `length` tokens. start: int32 [batch],
        how many tokens of padding each begins with; None is none."""
        limit = self.config.limit()
        if limit is not None and length > limit:
            raise ValueError(
                f"length must be at most {limit}, the positions of the model, got {length}"
            )
        first, weight = self._attention(), self.embedding.tokens.weight
        return KVCache(
            len(self.stack.layers),
            batch,
            first.kv_heads,
            length,
            first.head_dim,
            start=start,
            device=weight.device,
            dtype=weight.dtype,
        )

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """The newest S tokens [B,S] to their hidden states [B,S,d_model]; the cache takes their
        keys and values in."""
        parts.check_ids("input_ids", input_ids)
        count, before = input_ids.shape[1], cache.filled
        cache.advance(count)
        if self.embedding.positions is None:
            x = self.embedding(input_ids)
        elif cache.start is None:
            x = self.embedding(input_ids, offset=before)
        else:
            x = self.embedding(input_ids, positions=cache.positions(count))
        given = {}
        if cache.memory is not None:
            given = {"memory": cache.memory, "memory_mask": cache.memory_mask}
        bias = parts.bias_of(self.position_bias, None)
        return self.dropout(self.stack(x, cache=cache, position_bias=bias, **given))

    def _attention(self):
        if not len(self.stack.layers):
            raise ValueError("a model without layers has no cache")
        return self.stack.layers[0].attention
