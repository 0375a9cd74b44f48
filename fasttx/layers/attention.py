"""Multi-head attention, as torch.nn has it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attention import attention
from ..ops.attention_map import attention_map
from ._fit import MAX_HEAD_SIZE, fit, fit_autocast
from .feed_forward import project

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on fasttx.attention.

    Constructor, parameters, state_dict, the meaning of masks (True: hidden; floating: added) and
    errors are torch's. Masks are read as they are given, never expanded; with `is_causal` attn_mask
    is taken for the causal mask that torch's documentation asks for, and not read. A query that
    sees no key gets 0 before the output projection, where torch may give NaN. Dropout draws its
    seed from torch's generator; its bits are fasttx's. What no kernel runs (float64, nested
    tensors, heads above 256, dropout of 1) runs on torch.

    need_weights (torch's default) gives the probabilities, from the log-sum-exp of the fused op;
    where they carry gradients or dropout, torch's formula runs, in its S x T memory:
    need_weights=False is the fast way to train.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = (key_padding_mask, attn_mask, is_causal)
        weighs = need_weights and self._differentiates(
            query, key, value, attn_mask, key_padding_mask
        )
        if weighs or not self._fits(query, key, value, *masks):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        batched = query.dim() == 3
        same = query is key and key is value
        if not batched:
            query, key, value = (t[None] for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
            if same:
                key = value = query
        batch_first = self.batch_first or not batched
        B = query.shape[0 if batch_first else 1]
        mask, causal = merge_masks(key_padding_mask, attn_mask, is_causal, B, self.num_heads)
        out, weights = self.attend(query, key, value, mask, causal, batch_first, None, need_weights)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return out if batched else out[0], weights

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        batch_first: bool,
        cu_seqlens: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output for inputs that were checked, [B,S,E], or [S,B,E] unless `batch_first`, and
        the probabilities [B,H,S,T] or None. mask: as fasttx.attention's (True: visible).
        cu_seqlens: packed sequences in a batch of 1."""
        q, k, v = self._project(query, key, value)
        extra = []
        if self.bias_k is not None:
            extra.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, k.shape[-1]),) * 2)
        if extra:
            axis = 1 if batch_first else 0
            shape = [k.shape[0], k.shape[1], -1]
            shape[axis] = 1
            k, v = (
                torch.cat([t, *(pair[i].to(t.dtype).expand(shape) for pair in extra)], axis)
                for i, t in enumerate((k, v))
            )
            if mask is not None:
                mask = F.pad(mask, (0, len(extra)), value=mask.dtype is torch.bool)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).permute(order) for t in (q, k, v))
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, lse = attention(q, k, v, mask, p, causal, return_lse=True)
            weights = attention_map(q, k, lse, attn_mask=mask, is_causal=causal).to(q.dtype)
        else:
            out = attention(q, k, v, mask, p, causal, cu_seqlens=cu_seqlens)
        out = out.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(-2)
        return project(out, self.out_proj.weight, self.out_proj.bias), weights

    def _differentiates(self, *inputs: Tensor | None) -> bool:
        """Whether weights that are asked for have to carry gradients, or dropout."""
        return (self.training and self.dropout > 0) or (
            torch.is_grad_enabled()
            and any(
                isinstance(t, Tensor) and t.requires_grad for t in (*inputs, *self.parameters())
            )
        )

    def _project(self, query, key, value) -> tuple[Tensor, Tensor, Tensor]:
        bias, E = self.in_proj_bias, self.embed_dim
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return project(query, self.in_proj_weight, bias).split(E, -1)
        elif key is value:
            query_bias, rest = (None, None) if bias is None else bias.split([E, 2 * E])
            weight, rest_weight = self.in_proj_weight.split([E, 2 * E])
            k, v = project(key, rest_weight, rest).split(E, -1)
            return project(query, weight, query_bias), k, v
        else:
            weights = self.in_proj_weight.split(E)
        biases = (None,) * 3 if bias is None else bias.split(E)
        return tuple(map(project, (query, key, value), weights, biases))

    def _fits(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> bool:
        if not (fit(query, key, value) and query.dim() == key.dim() == value.dim()):
            return False
        if query.dim() not in (2, 3) or not self.fits(query):
            return False
        sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
        if sizes != (self.embed_dim, self.kdim, self.vdim) or key.shape[:-1] != value.shape[:-1]:
            return False
        axis = -2 if query.dim() == 2 or self.batch_first else 0
        S, T = query.shape[axis], key.shape[axis]
        B = 1 if query.dim() == 2 else query.shape[-3 if axis else 1]
        if query.dim() == 3 and key.shape[-3 if axis else 1] != B:
            return False
        if is_causal and (attn_mask is None or self.bias_k is not None or self.add_zero_attn):
            return False
        keys, heads = (B, T) if query.dim() == 3 else (T,), B * self.num_heads
        return (key_padding_mask is None or (_is_mask(key_padding_mask, query, (keys,)))) and (
            attn_mask is None or _is_mask(attn_mask, query, ((S, T), (heads, S, T)))
        )

    def fits(self, query: Tensor) -> bool:
        """Whether the module as it is now, and its parameters beside this input, are run here."""
        return (
            self.head_dim <= MAX_HEAD_SIZE
            and self.dropout < 1
            and not torch.overrides.has_torch_function((query,))
            and fit_autocast(
                query,
                self.in_proj_weight,
                self.q_proj_weight,
                self.k_proj_weight,
                self.v_proj_weight,
                self.in_proj_bias,
                self.out_proj.weight,
                self.out_proj.bias,
                self.bias_k,
                self.bias_v,
            )
        )


def merge_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool, B: int, heads: int
) -> tuple[Tensor | None, bool]:
    """torch.nn's masks, [B,T] and [S,T] or [B * heads,S,T], True or -inf where hidden, as one of
    fasttx.attention's, and whether it is causal beside."""
    keys = None if key_padding_mask is None else _turned(key_padding_mask)[:, None, None, :]
    pairs = None
    if attn_mask is not None and not is_causal:
        pairs = _turned(attn_mask)
        pairs = pairs.unflatten(0, (B, heads)) if pairs.dim() == 3 else pairs
    if keys is None or pairs is None:
        return keys if pairs is None else pairs, is_causal
    if keys.dtype is torch.bool and pairs.dtype is torch.bool:
        return keys & pairs, is_causal
    if keys.dtype is torch.bool:
        return pairs.masked_fill(~keys, -torch.inf), is_causal
    if pairs.dtype is torch.bool:
        return keys.masked_fill(~pairs, -torch.inf), is_causal
    return keys + pairs, is_causal


def _turned(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype is torch.bool else mask


def _is_mask(mask, query: Tensor, shapes: tuple) -> bool:
    return (
        isinstance(mask, Tensor)
        and mask.dtype in (torch.bool, query.dtype)
        and mask.device == query.device
        and mask.shape in shapes
    )
