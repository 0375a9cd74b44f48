"""Layers that keep no activations: computed again in the backward."""

import contextlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..layers import EncoderLayer

__all__ = ["recomputed"]


@contextlib.contextmanager
def recomputed(model: nn.Module):
    """The model's own way where it has one (transformers), else fasttx's layers one by one."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(model, f"{name}_enable"):
            getattr(model, f"{name}_enable")()
            try:
                yield
            finally:
                getattr(model, f"{name}_disable")()
            return
    layers = [m for m in model.modules() if isinstance(m, EncoderLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has neither "
            "gradient_checkpointing_enable nor layers of fasttx.nn"
        )
    for layer in layers:
        layer.forward, layer.run = _again(layer.forward), _again(layer.run)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward, layer.run


def _again(function):
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return run
