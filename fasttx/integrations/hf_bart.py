"""BART's modules as `patch` runs them: subclasses of transformers' own, of the same names."""

import functools

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart import modeling_bart

from .hf_fused import feed_forward, residual_norm
from .hf_unpad import bounds, packing_of, records_like


class _Layer:
    def _residual(self, norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        return residual_norm(norm, x, residual, self.dropout if self.training else 0.0)

    def _feed_forward(self, x: Tensor) -> Tensor:
        p = self.activation_dropout if self.training else 0.0
        out = feed_forward(x, self.fc1, self.activation_fn, self.fc2, hidden_dropout_p=p)
        if out is not None:
            return out
        hidden = self.activation_fn(self.fc1(x))
        hidden = nn.functional.dropout(hidden, p=self.activation_dropout, training=self.training)
        return self.fc2(hidden)


class BartEncoderLayer(_Layer, modeling_bart.BartEncoderLayer):
    def forward(self, hidden_states, attention_mask, **kwargs):
        x, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
        x = self._residual(self.self_attn_layer_norm, x, hidden_states)
        x = self._residual(self.final_layer_norm, self._feed_forward(x), x)
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            most = torch.finfo(x.dtype).max - 1000
            x = torch.clamp(x, min=-most, max=most)
        return x


class BartDecoderLayer(_Layer, modeling_bart.BartDecoderLayer):
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=True,
        **kwargs,
    ):
        x, _ = self.self_attn(
            hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        x = self._residual(self.self_attn_layer_norm, x, hidden_states)
        if encoder_hidden_states is not None:
            crossed, _ = self.encoder_attn(
                x,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            x = self._residual(self.encoder_attn_layer_norm, crossed, x)
        return self._residual(self.final_layer_norm, self._feed_forward(x), x)


@records_like(modeling_bart.BartEncoder)
class BartEncoder(modeling_bart.BartEncoder):
    """All layers without the padding; 0 at padding."""

    @functools.wraps(modeling_bart.BartEncoder.forward)
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        packing = None
        one = (input_ids is None) != (inputs_embeds is None)
        if one and not (self.training and self.layerdrop):
            packing = packing_of(self, attention_mask, kwargs)
        if packing is None:
            return super().forward(input_ids, attention_mask, inputs_embeds, **kwargs)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = packing.remove(x + self.embed_positions(x[:, :, -1]).to(x.device))
        x = self.layernorm_embedding(x)
        x = nn.functional.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, None, **bounds(packing), **kwargs)
        return BaseModelOutput(last_hidden_state=packing.restore(x))
