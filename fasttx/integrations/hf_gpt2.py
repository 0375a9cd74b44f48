"""GPT-2's modules as `patch` runs them: subclasses of transformers' own, of the same names."""

from torch import Tensor
from transformers.models.gpt2 import modeling_gpt2

from .hf_fused import dropout_p, feed_forward


class GPT2MLP(modeling_gpt2.GPT2MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        dropped = dropout_p(self.dropout)
        out = feed_forward(hidden_states, self.c_fc, self.act, self.c_proj, dropout_p=dropped)
        return super().forward(hidden_states) if out is None else out
