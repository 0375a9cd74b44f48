"""Layers and stacks for models of one's own: norm, activation, gate, grouped heads, positions and
cache as options."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.add_norm import add_norm
from ._fit import DTYPES, untouched
from .block_attention import Attention, CrossAttention
from .cache import KVCache
from .feed_forward import FeedForward
from .norm import LayerNorm, RMSNorm
from .padding import Packing

__all__ = ["DecoderLayer", "EncoderLayer", "Stack"]

_NORMS = {"layer": LayerNorm, "rms": RMSNorm}


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward layer, each with dropout, residual and norm.

    norm_first: x + f(norm(x)), as GPT-2 and T5; otherwise norm(x + f(x)), as BERT.

    Args:
        d_model, heads, dim_feedforward: widths and number of heads.
        norm: "layer" or "rms". eps: of the norms.
        norm_first: see above.
        activation, gated: of the feed-forward layer (FeedForward).
        dropout: after each part and of the feed-forward's hidden layer, unless
            hidden_dropout says otherwise; attention_dropout: of the probabilities.
        bias: of linear maps and layer norms.
        attention: further options of Attention, as a dict (kv_heads, head_dim, causal, scale,
            window, softcap).

    Parts: attention, norm1, feed_forward, norm2.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        dim_feedforward: int,
        *,
        norm: str = "layer",
        eps: float = 1e-5,
        norm_first: bool = False,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        attention_dropout: float = 0.0,
        bias: bool = True,
        attention: dict | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        factory = {"device": device, "dtype": dtype}
        options = {"eps": eps, **factory} | ({"bias": bias} if norm == "layer" else {})
        self.norm_first, self.dropout = norm_first, dropout
        self.attention = Attention(
            d_model, heads, bias=bias, dropout=attention_dropout, **(attention or {}), **factory
        )
        self.norm1 = _NORMS[norm](d_model, **options)
        self.feed_forward = FeedForward(
            d_model,
            dim_feedforward,
            dropout=dropout if hidden_dropout is None else hidden_dropout,
            activation=activation,
            bias=bias,
            gated=gated,
            **factory,
        )
        self.norm2 = _NORMS[norm](d_model, **options)

    def forward(self, x: Tensor, **given) -> Tensor:
        """x [B,S,d_model] to the same; given: what Attention's forward takes beside x."""
        x, branch = self.run(x, None, given)
        return x if branch is None else x + F.dropout(branch, self.dropout, self.training)

    def run(self, x: Tensor, branch: Tensor | None, given: dict) -> tuple[Tensor, Tensor | None]:
        """(x, branch) to the same: with norm_first the last part's result is not added yet, so that
        the next norm does that in one pass."""
        x, branch = self._part(self.norm1, x, branch, lambda y: self.attention(y, **given))
        return self._part(self.norm2, x, branch, self.feed_forward)

    def _part(self, norm, x, branch, function) -> tuple[Tensor, Tensor | None]:
        p = self.dropout if self.training else 0.0
        if self.norm_first:
            y, x = sum_and_norm(norm, x, branch, p)
            return x, function(y)
        return norm_of_sum(norm, x, function(x), p), None


class DecoderLayer(EncoderLayer):
    """EncoderLayer, causal, and with `cross` attention to a memory between its two parts.

    cross: None for a decoder alone (GPT), or further options of CrossAttention as a dict, which may
    be empty (memory_dim, kv_heads, head_dim, scale). Parts: attention, norm1, feed_forward, norm2
    and, with a memory, cross and norm_cross.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        dim_feedforward: int,
        *,
        attention: dict | None = None,
        cross: dict | None = None,
        **options,
    ):
        attention = {"causal": True} | (attention or {})
        super().__init__(d_model, heads, dim_feedforward, attention=attention, **options)
        if cross is None:
            self.cross = self.norm_cross = None
            return
        factory = {n: options[n] for n in ("device", "dtype") if n in options}
        self.cross = CrossAttention(
            d_model,
            heads,
            bias=options.get("bias", True),
            dropout=options.get("attention_dropout", 0.0),
            **cross,
            **factory,
        )
        kind, eps = type(self.norm1), self.norm1.eps
        bias = {"bias": options.get("bias", True)} if kind is LayerNorm else {}
        self.norm_cross = kind(d_model, eps=eps, **bias, **factory)

    def run(self, x: Tensor, branch: Tensor | None, given: dict) -> tuple[Tensor, Tensor | None]:
        own = {n: v for n, v in given.items() if n not in ("memory", "memory_mask")}
        memory, mask = given.get("memory"), given.get("memory_mask")
        if (memory is None) != (self.cross is None):
            raise ValueError(
                "memory must be given exactly where the layer was made with cross, got "
                f"memory={'None' if memory is None else 'a memory'}"
            )
        x, branch = self._part(self.norm1, x, branch, lambda y: self.attention(y, **own))
        if self.cross is not None:
            x, branch = self._part(
                self.norm_cross, x, branch, lambda y: self.cross(y, memory, attn_mask=mask)
            )
        return self._part(self.norm2, x, branch, self.feed_forward)


class Stack(nn.Module):
    """Layers one after the other, and a norm at the end or None.

    Padding is removed once before the layers and put back after them, as 0, where that pays: in
    eager code, with a padding mask and no other, without memory, rotary or cache.
    """

    def __init__(self, layers: Iterable[EncoderLayer], norm: nn.Module | None = None):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        cache: KVCache | None = None,
        **given,
    ) -> Tensor:
        """x [B,S,d_model] to the same.

        padding_mask: [B,S], bool or 0 and 1, True or 1 for real tokens. cache: a KVCache that was
        advanced by S. given: what the layers take beside x: attn_mask, position_bias, rotary, and
        for DecoderLayer memory (a tensor, or one pair of keys and values a layer) and memory_mask.
        """
        packing = None
        if padding_mask is not None:
            packing = self._padding(x, padding_mask, cache, given)
        if packing is not None:
            x = packing.remove(x)
        x = self._run(x, cache, given)
        return x if packing is None else packing.restore(x)

    def _padding(self, x, padding_mask, cache, given: dict) -> Packing | None:
        """How padding is removed, or None; `given` gets cu_seqlens, or attn_mask where it stays."""
        if padding_mask.shape != x.shape[:2]:
            raise ValueError(
                f"padding_mask must be [B, S] = {tuple(x.shape[:2])}, got "
                f"{tuple(padding_mask.shape)}"
            )
        if cache is not None:
            raise ValueError("padding_mask must be None with cache: give KVCache its start")
        visible = padding_mask.bool()
        packing = Packing(visible) if self._may_pack(visible, given) else None
        if packing is not None and packing.nothing_hidden():
            return None
        if packing is not None and packing.pays():
            given["cu_seqlens"] = packing.cu_seqlens
            return packing
        mask, other = visible[:, None, None, :], given.get("attn_mask")
        if other is not None and other.dtype is torch.bool:
            mask = mask & other
        elif other is not None:
            mask = other.masked_fill(~mask, -torch.inf)
        given["attn_mask"] = mask
        return None

    def _run(self, x: Tensor, cache: KVCache | None, given: dict) -> Tensor:
        branch, memory = None, given.get("memory")
        for i, layer in enumerate(self.layers):
            if cache is not None:
                given["cache"] = cache[i]
            if isinstance(memory, (list, tuple)):
                given["memory"] = memory[i]
            if layer._forward_hooks or layer._forward_pre_hooks or not layer.norm_first:
                x, branch = self._settled(x, branch, i), None
                x = layer(x, **given)
            else:
                x, branch = layer.run(x, branch, given)
        if self.norm is None:
            return self._settled(x, branch, len(self.layers))
        if branch is None:
            return self.norm(x)
        last = self.layers[-1]
        return norm_of_sum(self.norm, x, branch, last.dropout if last.training else 0.0)

    def _settled(self, x: Tensor, branch: Tensor | None, i: int) -> Tensor:
        """x with what the layer before layer i left to add."""
        if branch is None:
            return x
        last = self.layers[i - 1]
        return x + F.dropout(branch, last.dropout, last.training)

    def _may_pack(self, visible: Tensor, given: dict) -> bool:
        bias = given.get("position_bias")
        distances = bias is not None or any(
            layer.attention.window is not None for layer in self.layers
        )
        return (
            all(v is None for n, v in given.items() if n != "position_bias")
            and visible.numel() > 0
            and getattr(bias, "positions", None) is None
            and getattr(bias, "query_offset", None) is None
            and Packing.possible(visible)
            and not (distances and not Packing.contiguous(visible))
        )


def sum_and_norm(
    norm: nn.Module, x: Tensor, branch: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """(norm(s), s) with s = x + dropout(branch), in one pass where the norm is one of fasttx's."""
    return (norm(x), x) if branch is None else _add_norm(norm, x, branch, p, True)


def norm_of_sum(norm: nn.Module, x: Tensor, branch: Tensor, p: float) -> Tensor:
    """norm(x + dropout(branch)), as sum_and_norm without the sum."""
    return _add_norm(norm, x, branch, p, False)


def _add_norm(norm, x, branch, p, prenorm):
    fits = untouched(norm, LayerNorm, RMSNorm) and {x.dtype, branch.dtype} <= set(DTYPES)
    if not fits or len(norm.normalized_shape) != 1:
        total = x + F.dropout(branch, p, p > 0)
        return (norm(total), total) if prenorm else norm(total)
    rms = type(norm) is RMSNorm
    return add_norm(
        branch,
        x,
        weight=norm.weight,
        bias=None if rms else norm.bias,
        dropout_p=p,
        eps=torch.finfo(x.dtype).eps if norm.eps is None else norm.eps,
        kind="rms" if rms else "layer",
        prenorm=prenorm,
    )
