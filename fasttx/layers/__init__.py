"""torch.nn's transformer modules on fasttx's ops, and blocks for models of one's own: `fasttx.nn`.

The drop-ins have the constructors, parameter names, state_dict, masks and errors of their torch
classes, which they inherit from."""

from .attention import MultiheadAttention
from .feed_forward import FeedForward, Linear
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .softmax import LogSoftmax, Softmax
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "CrossEntropyLoss",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
