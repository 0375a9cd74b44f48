"""Encoders: BERT, RoBERTa, and the first half of T5 and BART."""

from torch import Tensor, nn

from . import parts
from .config import Config

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """Token ids to hidden states, every token seeing every other.

    Parts: embedding, position_bias (T5) and stack.
    """

    def __init__(self, config: Config, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.embedding = parts.embedding(config, factory)
        self.position_bias = parts.position_bias(config, factory, decoder=False)
        self.stack = parts.stack(config, factory, decoder=False)
        self.dropout = nn.Dropout(config.dropout if config.final_dropout else 0.0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B,S] to [B,S,d_model]. attention_mask [B,S], 1 or True for real tokens."""
        limit = self.config.limit() if position_ids is None else None
        parts.check_ids("input_ids", input_ids, limit)
        parts.check_mask("attention_mask", attention_mask, input_ids)
        x = self.embedding(input_ids, token_type_ids, positions=position_ids)
        bias = parts.bias_of(self.position_bias, attention_mask)
        return self.dropout(self.stack(x, padding_mask=attention_mask, position_bias=bias))
