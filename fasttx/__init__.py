"""fasttx: fused transformer kernels (Triton, C++ SIMD) behind PyTorch autograd: as ops, as layers
(fasttx.nn), as models (fasttx.models) and as a patch of existing models."""

import importlib

from . import layers as nn
from .explain import explain
from .integrations.patch import patch, unpatch
from .ops import (
    ALiBi,
    RelativePositionBias,
    add_norm,
    attention,
    attention_decode,
    attention_map,
    cache_append,
    cross_entropy,
    embed,
    ffn,
    layer_norm,
    linear,
    linear_cross_entropy,
    log_softmax,
    rms_norm,
    rope,
    sample,
    sinusoidal_positions,
    softmax,
)

__version__ = "0.1.0"
__all__ = [
    "ALiBi",
    "RelativePositionBias",
    "add_norm",
    "attention",
    "attention_decode",
    "attention_map",
    "cache_append",
    "cross_entropy",
    "embed",
    "explain",
    "ffn",
    "from_pretrained",
    "inspect",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "models",
    "nn",
    "patch",
    "rms_norm",
    "rope",
    "sample",
    "sinusoidal_positions",
    "softmax",
    "training",
    "unpatch",
]


def __getattr__(name: str):
    """Models, training and inspect are imported when they are asked for."""
    if name == "from_pretrained":
        return importlib.import_module(".models", __name__).from_pretrained
    if name in ("inspect", "models", "training"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
