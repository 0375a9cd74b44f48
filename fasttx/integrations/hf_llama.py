"""Llama's modules as `patch` runs them: subclasses of transformers' own, of the same names."""

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from ..ops.add_norm import rms_norm
from ..ops.rope import rope
from .hf_fused import feed_forward


class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        kind = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return rms_norm(hidden_states.to(kind), weight=self.weight, eps=self.variance_epsilon)


class LlamaAttention(modeling_llama.LlamaAttention):
    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        shape = hidden_states.shape[:-1]
        query, key, value = (
            project(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rope(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.reshape(*shape, -1)), weights


class LlamaMLP(modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        out = feed_forward(x, self.gate_proj, self.act_fn, self.down_proj, gate=self.up_proj)
        return super().forward(x) if out is None else out
