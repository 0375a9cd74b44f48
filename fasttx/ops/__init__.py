"""One file an op: formula and shapes, forward and backward declarations, ordered kernel table,
autograd, the public function."""

from .add_norm import add_norm, layer_norm, rms_norm
from .attention import ALiBi, RelativePositionBias, attention
from .attention_decode import attention_decode, cache_append
from .attention_map import attention_map
from .cross_entropy import cross_entropy
from .embed import embed, sinusoidal_positions
from .ffn import ffn
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .rope import rope
from .sample import sample
from .softmax import log_softmax, softmax

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
    "ffn",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "rope",
    "sample",
    "sinusoidal_positions",
    "softmax",
]
