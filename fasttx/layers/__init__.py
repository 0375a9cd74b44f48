"""torch.nn's transformer modules on fasttx's ops, and blocks for models of one's own: `fasttx.nn`.

The drop-ins have the constructors, parameter names, state_dict, masks and errors of their torch
classes, which they inherit from."""

from .attention import MultiheadAttention
from .block_attention import Attention, CrossAttention
from .blocks import DecoderLayer, EncoderLayer, Stack
from .cache import KVCache
from .embedding import (
    Embedding,
    LearnedPositions,
    SinusoidalPositions,
    TransformerEmbedding,
)
from .feed_forward import FeedForward, Linear
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .positions import ALiBiBias, RelativeBias, Rotary
from .softmax import LogSoftmax, Softmax
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "ALiBiBias",
    "Attention",
    "CrossAttention",
    "CrossEntropyLoss",
    "DecoderLayer",
    "Embedding",
    "EncoderLayer",
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "RelativeBias",
    "Rotary",
    "SinusoidalPositions",
    "Softmax",
    "Stack",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEmbedding",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
