"""One file an op: formula and shapes, forward and backward declarations, ordered kernel table,
autograd, the public function."""

from .add_norm import add_norm, layer_norm, rms_norm
from .attention import ALiBi, RelativePositionBias, attention
from .attention_decode import attention_decode, cache_append
from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .rope import rope

__all__ = [
    "ALiBi",
    "RelativePositionBias",
    "add_norm",
    "attention",
    "attention_decode",
    "cache_append",
    "cross_entropy",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
]
