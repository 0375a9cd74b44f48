"""BLOOM's modules as `patch` runs them: subclasses of transformers' own, of the same names."""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers.models.bloom import modeling_bloom

from ..ops.attention import ALiBi, attention
from .hf_attention import additive_mask, alignment
from .hf_fused import dropout_p, feed_forward


class BloomAttention(modeling_bloom.BloomAttention):
    """ALiBi in float32 inside the kernel: transformers rounds slope * position to the model's
    dtype, which in bfloat16 merges positions from 256 on."""

    is_causal = True

    def forward(
        self,
        hidden_states,
        residual,
        alibi,
        attention_mask,
        layer_past=None,
        use_cache=False,
        output_attentions=False,
        **kwargs,
    ):
        given = attention_mask is not None and attention_mask.is_floating_point()
        dropped = dropout_p(self.attention_dropout)
        sliced = self.pretraining_tp > 1 and self.slow_but_exact
        if given or output_attentions or sliced or dropped is None:
            if not given:
                causal = alignment(self, hidden_states.shape[1], attention_mask)
                S, T = hidden_states.shape[1], alibi.shape[-1]
                mask = attention_mask
                if mask is not None and mask.dim() == 5:
                    mask = mask[:, 0]
                attention_mask = additive_mask(mask, causal, S, T, hidden_states)
            return super().forward(
                hidden_states,
                residual,
                alibi,
                attention_mask,
                layer_past,
                use_cache,
                output_attentions,
                **kwargs,
            )
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out = attention(
            query,
            key,
            value,
            attention_mask[:, 0] if _is_causal_padding(attention_mask) else attention_mask,
            dropped,
            alignment(self, query.shape[2], attention_mask),
            scale=self.inv_norm_factor,
            position_bias=ALiBi(_slopes(self.num_heads, query.device), _positions(attention_mask)),
        )
        out = self.dense(out.transpose(1, 2).flatten(2))
        return modeling_bloom.dropout_add(out, residual, self.hidden_dropout, self.training), None


class BloomMLP(modeling_bloom.BloomMLP):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        out = None
        if not (self.pretraining_tp > 1 and self.slow_but_exact):
            out = feed_forward(
                hidden_states, self.dense_h_to_4h, self.gelu_impl, self.dense_4h_to_h
            )
        if out is None:
            return super().forward(hidden_states, residual)
        return modeling_bloom.dropout_add(out, residual, self.hidden_dropout, self.training)


def _is_causal_padding(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 5


def _positions(mask: Tensor | None) -> Tensor | None:
    """transformers' positions [B, T], which count the keys that are no padding. A mask with a row a
    query comes from padding and causality alone: its last row sees every key that any row sees."""
    if mask is None:
        return None
    seen = mask.flatten(1, -2)[:, -1]
    return (seen.cumsum(-1) - 1) * seen


def _slopes(heads: int, device: torch.device) -> Tensor:
    return torch.tensor(_slope_values(heads), dtype=torch.float32, device=device)


def _slope_values(heads: int) -> tuple[float, ...]:
    return _slope_rule(heads)


# What torch.compiler.assume_constant_result sets, as in fasttx/ops/_position_bias.py.
_slope_values._dynamo_marked_constant = True


@functools.cache
def _slope_rule(heads: int) -> tuple[float, ...]:
    # transformers' own, rounded as it rounds them.
    with _disable_current_modes():
        return tuple(modeling_bloom._get_alibi_slopes(heads, torch.device("cpu")).tolist())
