"""fasttx: fused transformer kernels (Triton, C++ SIMD) behind PyTorch autograd: as ops, as layers
(fasttx.nn) and as a patch of existing models."""

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
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "nn",
    "patch",
    "rms_norm",
    "rope",
    "sample",
    "sinusoidal_positions",
    "softmax",
    "unpatch",
]
