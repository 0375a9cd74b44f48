"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from .options import TrainOptions

__all__ = ["learning_rate", "make_optimizer"]


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """torch's AdamW, fused; weight decay for matrices, not for vectors (norms and biases)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no parameters that require gradients")
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )


def learning_rate(options: TrainOptions, step: int, steps: int) -> float:
    """Of step 0, 1, ... of `steps`: (step + 1) / warmup of the peak at first, then from the peak
    down to final_learning_rate, reached where the training ends: linear, or half a cosine."""
    warmup = math.ceil(options.warmup * steps) if options.warmup < 1 else int(options.warmup)
    peak, last = options.learning_rate, options.final_learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    fall = done if options.schedule == "linear" else (1 - math.cos(math.pi * min(done, 1))) / 2
    return peak + (last - peak) * min(fall, 1)
