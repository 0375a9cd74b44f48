"""Self- and cross-attention for models of one's own."""

import torch
from torch import Tensor, nn

from ..ops.attention import ALiBi, RelativePositionBias, attention
from ..ops.attention_decode import attention_decode, cache_append
from ..ops.rope import rope
from .cache import LayerCache
from .feed_forward import Linear

__all__ = ["Attention", "CrossAttention"]


class Attention(nn.Module):
    """Self-attention: out(attention(q, k, v)) with q, k, v from one linear map.

    Args:
        d_model, heads: width, and number of query heads.
        kv_heads: number of key and value heads, a divisor of heads (grouped queries); None: heads.
        head_dim: None is d_model // heads.
        causal: a token sees itself and what stands before it.
        dropout: of the probabilities, in training.
        bias: of the linear maps.
        scale: of the logits; None is head_dim ** -0.5 (T5: 1.0).
        window: (left, right), as fasttx.attention's.
        softcap: as fasttx.attention's.

    Parameters: qkv ([heads + 2 kv_heads] * head_dim rows: all queries, all keys, all values) and
    out.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = _heads(d_model, heads, kv_heads, head_dim)
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.qkv = Linear(d_model, (heads + 2 * self.kv_heads) * self.head_dim, **options)
        self.out = Linear(heads * self.head_dim, d_model, **options)
        self.causal, self.dropout, self.scale = causal, dropout, scale
        self.window, self.softcap = window, softcap

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        position_bias: ALiBi | RelativePositionBias | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B,S,d_model] to the same; [1, total, d_model] with cu_seqlens.

        attn_mask, position_bias, cu_seqlens: fasttx.attention's. rotary: (cos, sin), fasttx.rope's.
        cache: this layer's part of a KVCache that was advanced by S; the mask of padding is then
        the cache's own start, and attn_mask is refused.
        """
        H, G, D = self.heads, self.kv_heads, self.head_dim
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, D)).transpose(1, 2).split((H, G, G), 1)
        if rotary is not None:
            q, k = rope(q, k, *rotary)
        options = {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "position_bias": position_bias,
        }
        if cache is not None:
            if attn_mask is not None or cu_seqlens is not None:
                raise ValueError("attn_mask and cu_seqlens must be None with cache")
            out = self._cached(q, k, v, cache, options)
        else:
            p = self.dropout if self.training else 0.0
            out = attention(q, k, v, attn_mask, p, self.causal, cu_seqlens=cu_seqlens, **options)
        return self.out(out.transpose(1, 2).flatten(-2))

    def _cached(self, q, k, v, cache, options) -> Tensor:
        whole, S = cache.whole, q.shape[2]
        cache_append(cache.keys, cache.values, k, v, whole.lengths)
        if whole.filled == S and S > 1:  # the first tokens: they see each other alone
            mask = None
            if whole.start is not None:
                places = torch.arange(S, device=q.device)
                mask = (places >= whole.start[:, None])[:, None, None, :]
            return attention(q, k, v, mask, is_causal=self.causal, **options)
        return attention_decode(
            q,
            cache.keys,
            cache.values,
            whole.lengths,
            cache_start=whole.start,
            is_causal=self.causal,
            **options,
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}"


class CrossAttention(nn.Module):
    """Attention of x to a memory of another length and width; arguments as Attention's.

    memory_dim: width of the memory; None is d_model. Parameters: q, kv (all keys, all values), out.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        memory_dim: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        scale: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = _heads(d_model, heads, kv_heads, head_dim)
        options = {"bias": bias, "device": device, "dtype": dtype}
        width = d_model if memory_dim is None else memory_dim
        self.q = Linear(d_model, heads * self.head_dim, **options)
        self.kv = Linear(width, 2 * self.kv_heads * self.head_dim, **options)
        self.out = Linear(heads * self.head_dim, d_model, **options)
        self.dropout, self.scale = dropout, scale

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory [B,T,memory_dim], each [B, kv_heads, T, head_dim]: computed
        once, given to every step of a generation in the memory's place."""
        keys = self.kv(memory).unflatten(-1, (2 * self.kv_heads, self.head_dim)).transpose(1, 2)
        return keys.chunk(2, 1)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        *,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B,S,d_model] to the same. memory: [B,T,memory_dim], or what `project` gave of it.
        attn_mask: fasttx.attention's. A memory of fewer sequences serves B / that many neighbours
        each: they look at it as if they were more queries of one sequence."""
        k, v = self.project(memory) if isinstance(memory, Tensor) else memory
        if k.shape[0] != x.shape[0] and k.shape[0] > 0 and x.shape[0] % k.shape[0] == 0:
            together = x.reshape(k.shape[0], -1, x.shape[-1])
            return self(together, (k, v), attn_mask=attn_mask).view(*x.shape[:-1], -1)
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        p = self.dropout if self.training else 0.0
        out = attention(q, k, v, attn_mask, p, scale=self.scale)
        return self.out(out.transpose(1, 2).flatten(-2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}"


def _heads(d_model: int, heads: int, kv_heads: int | None, head_dim: int | None) -> tuple:
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
    if head_dim is None:
        if d_model % heads:
            raise ValueError(
                f"heads must divide d_model where head_dim is None, got {heads} and {d_model}"
            )
        head_dim = d_model // heads
    return heads, kv_heads, head_dim
