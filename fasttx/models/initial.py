"""Initial values of a model that is not loaded."""

import math

import torch
from torch import nn

from ..layers import Attention, CrossAttention, FeedForward, RelativeBias

__all__ = ["initialize"]


@torch.no_grad()
def initialize(model: nn.Module, part: nn.Module | None = None) -> None:
    """Matrices from normal(0, config.init_std), biases 0, norms 1, as in each family's original:
    GPT-2 divides what enters the residual stream by sqrt(2 layers), T5 scales by the widths.
    part: only these parameters."""
    config = model.config
    for module in (part or model).modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0, config.init_std)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
            if getattr(module, "padding_idx", None) is not None:
                module.weight[module.padding_idx].zero_()
    for module in (part or model).modules():
        if config.family == "t5":
            _t5(module, config)
        elif config.family == "gpt2" and isinstance(module, (Attention, FeedForward)):
            last = module.out if isinstance(module, Attention) else module.linear2
            last.weight.normal_(0, config.init_std / math.sqrt(2 * max(config.layers, 1)))


def _t5(module: nn.Module, config) -> None:
    width = config.d_model**-0.5
    if isinstance(module, nn.Embedding):
        module.weight.normal_(0, 1)
    elif isinstance(module, RelativeBias):
        module.weight.normal_(0, width)
    elif isinstance(module, FeedForward):
        module.linear1.weight.normal_(0, width)
        module.linear2.weight.normal_(0, module.linear2.in_features**-0.5)
        if module.gate is not None:
            module.gate.weight.normal_(0, width)
    elif isinstance(module, (Attention, CrossAttention)):
        rows = module.heads * module.head_dim
        queries = module.qkv.weight[:rows] if isinstance(module, Attention) else module.q.weight
        others = module.qkv.weight[rows:] if isinstance(module, Attention) else module.kv.weight
        queries.normal_(0, width * module.head_dim**-0.5)
        others.normal_(0, width)
        module.out.weight.normal_(0, rows**-0.5)
