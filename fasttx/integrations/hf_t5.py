"""T5's modules as `patch` runs them: subclasses of transformers' own, of the same names."""

import functools

from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

from ..ops.add_norm import rms_norm
from ..ops.attention import RelativePositionBias
from .hf_families import NAME
from .hf_fused import dropout_p, feed_forward, is_plain, rms_normed
from .hf_unpad import bounds, packing_of, records_like


class T5Attention(modeling_t5.T5Attention):
    """Its position bias is the learned table, which the kernel reads by distance: no [1, H, S, T]
    tensor of biases, and none of zeros for cross-attention."""

    def compute_bias(
        self, query_length, key_length, device=None, past_seen_tokens=0
    ) -> RelativePositionBias | Tensor:
        table = self.relative_attention_bias
        ours = self.config._attn_implementation == NAME and is_plain(table, nn.Embedding)
        if not ours or isinstance(past_seen_tokens, Tensor):
            # One row of biases a head and generated token: a static cache's length is a tensor.
            return super().compute_bias(query_length, key_length, device, past_seen_tokens)
        newest = key_length == past_seen_tokens + query_length
        return RelativePositionBias(
            table.weight,
            bidirectional=not self.is_decoder,
            max_distance=self.relative_attention_max_distance,
            query_offset=None if newest else past_seen_tokens,
        )

    def forward(
        self,
        hidden_states,
        mask=None,
        key_value_states=None,
        position_bias=None,
        past_key_values=None,
        **kwargs,
    ):
        ours = self.config._attn_implementation == NAME
        if ours and position_bias is None and not self.has_relative_attention_bias:
            position_bias = False
        return super().forward(
            hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs
        )


class T5LayerNorm(modeling_t5.T5LayerNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_normed(hidden_states, self.weight, self.variance_epsilon, rms_norm)


class T5DenseActDense(modeling_t5.T5DenseActDense):
    def forward(self, hidden_states: Tensor) -> Tensor:
        p = dropout_p(self.dropout)
        out = feed_forward(hidden_states, self.wi, self.act, self.wo, hidden_dropout_p=p)
        return super().forward(hidden_states) if out is None else out


class T5DenseGatedActDense(modeling_t5.T5DenseGatedActDense):
    def forward(self, hidden_states: Tensor) -> Tensor:
        p = dropout_p(self.dropout)
        out = feed_forward(
            hidden_states, self.wi_0, self.act, self.wo, gate=self.wi_1, hidden_dropout_p=p
        )
        return super().forward(hidden_states) if out is None else out


@records_like(modeling_t5.T5Stack)
class T5Stack(modeling_t5.T5Stack):
    """As an encoder: all layers without the padding; 0 at padding. Its biases are of distances, so
    each sequence has to be one run of tokens."""

    @functools.wraps(modeling_t5.T5Stack.forward)
    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs):
        embeds = kwargs.get("inputs_embeds")
        packing = None
        if not args and not self.is_decoder and (input_ids is None) != (embeds is None):
            given = {name: v for name, v in kwargs.items() if name != "inputs_embeds"}
            packing = packing_of(self, attention_mask, given)
        if packing is None or not packing.contiguous(attention_mask.bool()):
            return super().forward(input_ids, attention_mask, *args, **kwargs)
        x = self.embed_tokens(input_ids) if embeds is None else embeds
        kwargs["inputs_embeds"] = packing.remove(x)
        found = super().forward(**kwargs, **bounds(packing))
        found.last_hidden_state = packing.restore(found.last_hidden_state)
        return found
