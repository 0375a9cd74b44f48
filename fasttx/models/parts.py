"""What the three topologies share: an embedding, a stack, biases of positions, checks of inputs."""

import torch
from torch import Tensor, nn

from ..layers import (
    ALiBiBias,
    DecoderLayer,
    EncoderLayer,
    LayerNorm,
    LearnedPositions,
    RelativeBias,
    RMSNorm,
    SinusoidalPositions,
    Stack,
    TransformerEmbedding,
)
from ..layers.padding import Packing
from ..ops.attention import ALiBi, RelativePositionBias
from .config import Config

_NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def embedding(config: Config, factory: dict) -> TransformerEmbedding:
    positions = None
    if config.positions == "learned":
        positions = LearnedPositions(
            config.max_positions, config.d_model, reserved=config.reserved, **factory
        )
    elif config.positions == "sinusoidal":
        positions = SinusoidalPositions(
            config.d_model, interleaved=False, **_values(factory), dtype=factory.get("dtype")
        )
    return TransformerEmbedding(
        config.vocab_size,
        config.d_model,
        positions=positions,
        segments=config.segments,
        norm=_norm(config, factory) if config.embedding_norm else None,
        dropout=config.embedding_dropout,
        scale=config.embedding_scale,
        padding_idx=config.padding_idx,
        padding_positions=config.padding_positions,
        **factory,
    )


def stack(config: Config, factory: dict, *, decoder: bool, cross: bool = False) -> Stack:
    """The layers of one side; decoder: causal ones, cross: with attention to a memory."""
    second = decoder and config.topology == "seq2seq"
    heads = config.decoder_heads if second else config.heads
    attention = {"head_dim": config.head_dim, "scale": config.attention_scale}
    if second and config.positions != "relative":
        attention["head_dim"] = config.d_model // heads
    options = {
        "norm": config.norm,
        "eps": config.eps,
        "norm_first": config.norm_first,
        "activation": config.activation,
        "gated": config.gated,
        "dropout": config.dropout,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "bias": config.bias,
        **factory,
    }
    layers = []
    for i in range(config.decoder_layers if second else config.layers):
        own = dict(attention)
        if config.layer_scale:
            own["scale"] = (own["scale"] or config.head_dim**-0.5) / (i + 1)
        if cross:
            options["cross"] = attention
        kind = DecoderLayer if decoder else EncoderLayer
        d_ff = config.decoder_d_ff if second else config.d_ff
        layers.append(kind(config.d_model, heads, d_ff, attention=own, **options))
    return Stack(layers, _norm(config, factory) if config.final_norm else None)


def position_bias(config: Config, factory: dict, *, decoder: bool) -> nn.Module | None:
    if config.positions == "alibi":
        return ALiBiBias(config.heads, **_values(factory))
    if config.positions == "relative":
        return RelativeBias(
            config.decoder_heads if decoder and config.topology == "seq2seq" else config.heads,
            config.buckets,
            config.max_distance,
            bidirectional=not decoder,
            **factory,
        )
    return None


def bias_of(part: nn.Module | None, mask: Tensor | None) -> ALiBi | RelativePositionBias | None:
    """What a layer takes as position_bias. ALiBi counts real tokens; where they stand in one run
    that is the distance of the keys, and padding may be removed."""
    if not isinstance(part, ALiBiBias) or mask is None:
        return None if part is None else part()
    if Packing.possible(mask) and Packing.contiguous(mask.bool()):
        return part()
    return part(mask)


def check_ids(name: str, ids: Tensor, limit: int | None = None, past: int = 0) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} must be int64 or int32 [B, S], got {ids.dtype} {tuple(ids.shape)}"
        )
    if limit is not None and past + ids.shape[1] > limit:
        raise ValueError(
            f"{name} must not reach past the {limit} positions of the model, got "
            f"{past + ids.shape[1]} tokens a sequence"
        )


def check_mask(name: str, mask: Tensor | None, ids: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(
            f"{name} must be [B, S] = {tuple(ids.shape)}, 1 or True for real tokens, got "
            f"{tuple(mask.shape)}"
        )


def key_mask(mask: Tensor | None) -> Tensor | None:
    """[B,T] of real tokens as attention's mask."""
    return None if mask is None else mask.bool()[:, None, None, :]


def _norm(config: Config, factory: dict) -> nn.Module:
    return _NORMS[config.norm](config.d_model, eps=config.eps, **factory)


def _values(factory: dict) -> dict:
    """Tables that are computed, not loaded, have values even in a model without memory."""
    device = factory.get("device")
    return {"device": None if str(device) == "meta" else device}
