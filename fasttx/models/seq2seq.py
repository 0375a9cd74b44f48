"""Encoder-decoders: T5, BART, and the sinusoidal one of the original Transformer."""

import torch
from torch import Tensor, nn

from ..layers import KVCache
from . import parts
from .config import Config
from .decoder import Decoder
from .encoder import Encoder

__all__ = ["Seq2Seq"]


class Seq2Seq(nn.Module):
    """An encoder, and a decoder that attends to what it gives; one token table for both, unless
    config.shared is False."""

    def __init__(self, config: Config, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.encoder, self.decoder = Encoder(config, **factory), Decoder(config, **factory)
        if config.shared:
            self.decoder.embedding.tokens = self.encoder.embedding.tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(hidden states of the decoder [B,S,d_model], memory [B,T,d_model]). memory: what
        `encode` gave before, instead of encoding again."""
        parts.check_mask("attention_mask", attention_mask, input_ids)
        if memory is None:
            memory = self.encoder(input_ids, attention_mask)
        parts.check_ids("decoder_input_ids", decoder_input_ids, self.config.limit())
        parts.check_mask("decoder_attention_mask", decoder_attention_mask, decoder_input_ids)
        hidden = self.decoder(
            decoder_input_ids, decoder_attention_mask, memory=memory, memory_mask=attention_mask
        )
        return hidden, memory

    def start(self, memory: Tensor, attention_mask: Tensor | None, cache: KVCache) -> None:
        """The memory's keys and values of every layer, into the cache: once a generation."""
        with torch.no_grad():
            cache.memory = [layer.cross.project(memory) for layer in self.decoder.stack.layers]
        cache.memory_mask = parts.key_mask(attention_mask)

    def shifted(self, labels: Tensor) -> Tensor:
        """The decoder's input for these targets: the start token, then all but the last; ignored
        targets (-100) become padding."""
        first = self.config.decoder_start_token_id
        if first is None:
            raise ValueError("decoder_input_ids must be given: the config has no start token")
        ids = torch.roll(labels, 1, -1)
        ids[:, 0] = first
        return ids.masked_fill(ids == -100, self.config.pad_token_id or 0)
