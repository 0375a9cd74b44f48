"""Encoder and decoder layers, their stacks and the whole Transformer, as torch.nn has them."""

import functools

import torch
from torch import Tensor, nn

from ..ops.add_norm import add_norm, layer_norm
from ._fit import DTYPES, dropout_p, untouched
from .attention import MultiheadAttention, merge_masks
from .feed_forward import feed_forward
from .norm import LayerNorm
from .padding import Packing

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


def fast_classes(module: nn.Module) -> None:
    """Every part that is exactly a class of torch.nn with a faster one here becomes that; nothing
    else about it changes."""
    for part in module.modules():
        part.__class__ = _FASTER.get(type(part), type(part))


class _Layer(nn.Module):
    """What encoder and decoder layers share."""

    def _fits(self, x: Tensor, *attentions: str) -> bool:
        """Whether every part is what the constructor made, so that parts may be run together."""
        parts = self._modules
        return (
            isinstance(x, Tensor)
            and x.dtype in DTYPES
            and not x.is_nested
            and x.dim() == 3
            and x.shape[-1] == self.self_attn.embed_dim
            and all(untouched(parts[name], nn.Linear) for name in ("linear1", "linear2"))
            and all(
                untouched(parts[name], LayerNorm, nn.LayerNorm) and parts[name].weight is not None
                for name in parts
                if name.startswith("norm")
            )
            and all(
                untouched(parts[name], nn.Dropout) and parts[name].p < 1
                for name in parts
                if name.startswith("dropout")
            )
            and all(
                untouched(parts[name], MultiheadAttention)
                and parts[name].embed_dim == x.shape[-1]
                and parts[name].in_proj_weight is not None
                and parts[name].fits(x)
                for name in attentions
            )
            and self.norm1.normalized_shape == x.shape[-1:]
            and (
                torch.is_autocast_enabled(x.device.type)
                or (self.norm1.weight.dtype is x.dtype and self.linear1.weight.dtype is x.dtype)
            )
        )

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)


def _add_norm(x: Tensor, residual: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm, prenorm=False):
    return add_norm(
        x,
        residual,
        weight=norm.weight,
        bias=norm.bias,
        dropout_p=dropout_p(dropout),
        eps=norm.eps,
        prenorm=prenorm,
    )


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return layer_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)


class TransformerEncoderLayer(nn.TransformerEncoderLayer, _Layer):
    """torch.nn.TransformerEncoderLayer on fasttx's attention, feed-forward and add_norm.

    Constructor, initial values, parameters, state_dict, masks and errors are torch's; dropout's
    bits are fasttx's, and a token that sees no other gives no NaN. Where a part was replaced,
    carries hooks or is of a dtype no kernel knows, the parts run one by one, as in torch.
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fast_classes(self.self_attn)
        fast_classes(self.norm1)
        fast_classes(self.norm2)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        attn = self.self_attn
        if not (
            self.fits(src) and attn._fits(src, src, src, src_key_padding_mask, src_mask, is_causal)
        ):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        batch = src.shape[0 if attn.batch_first else 1]
        mask, causal = merge_masks(src_key_padding_mask, src_mask, is_causal, batch, attn.num_heads)
        return self.run(src, mask, causal, attn.batch_first)

    def fits(self, src: Tensor) -> bool:
        own = type(self)
        return (
            own._sa_block is nn.TransformerEncoderLayer._sa_block
            and own._ff_block is nn.TransformerEncoderLayer._ff_block
            and self._fits(src, "self_attn")
        )

    def run(
        self,
        x: Tensor,
        mask: Tensor | None,
        causal: bool,
        batch_first: bool,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The layer for inputs that were checked, as MultiheadAttention.attend takes them."""
        places = (mask, causal, batch_first, cu_seqlens)
        if self.norm_first:
            normed = _norm(x, self.norm1)
            attended = self.self_attn.attend(normed, normed, normed, *places)[0]
            normed, x = _add_norm(attended, x, self.dropout1, self.norm2, prenorm=True)
            return x + self.dropout2(self._feed_forward(normed))
        x = _add_norm(self.self_attn.attend(x, x, x, *places)[0], x, self.dropout1, self.norm1)
        return _add_norm(self._feed_forward(x), x, self.dropout2, self.norm2)


class TransformerDecoderLayer(nn.TransformerDecoderLayer, _Layer):
    """torch.nn.TransformerDecoderLayer on fasttx's attention, feed-forward and add_norm; as
    TransformerEncoderLayer in everything else."""

    @functools.wraps(nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for part in (self.self_attn, self.multihead_attn, self.norm1, self.norm2, self.norm3):
            fast_classes(part)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        own, cross = self.self_attn, self.multihead_attn
        own_masks = (tgt_key_padding_mask, tgt_mask, tgt_is_causal)
        cross_masks = (memory_key_padding_mask, memory_mask, memory_is_causal)
        if not (
            self.fits(tgt)
            and own._fits(tgt, tgt, tgt, *own_masks)
            and cross._fits(tgt, memory, memory, *cross_masks)
            and own.batch_first == cross.batch_first
        ):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        batch = tgt.shape[0 if own.batch_first else 1]
        own_masks = (*merge_masks(*own_masks, batch, own.num_heads), own.batch_first)
        cross_masks = (*merge_masks(*cross_masks, batch, cross.num_heads), own.batch_first)
        x = tgt
        if self.norm_first:
            y = _norm(x, self.norm1)
            y, x = _add_norm(
                own.attend(y, y, y, *own_masks)[0], x, self.dropout1, self.norm2, prenorm=True
            )
            y, x = _add_norm(
                cross.attend(y, memory, memory, *cross_masks)[0],
                x,
                self.dropout2,
                self.norm3,
                prenorm=True,
            )
            return x + self.dropout3(self._feed_forward(y))
        x = _add_norm(own.attend(x, x, x, *own_masks)[0], x, self.dropout1, self.norm1)
        y = cross.attend(x, memory, memory, *cross_masks)[0]
        x = _add_norm(y, x, self.dropout2, self.norm2)
        return _add_norm(self._feed_forward(x), x, self.dropout3, self.norm3)

    def fits(self, tgt: Tensor) -> bool:
        own = type(self)
        return (
            own._sa_block is nn.TransformerDecoderLayer._sa_block
            and own._mha_block is nn.TransformerDecoderLayer._mha_block
            and own._ff_block is nn.TransformerDecoderLayer._ff_block
            and self._fits(tgt, "self_attn", "multihead_attn")
        )


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder that removes padding once.

    With a boolean src_key_padding_mask, no mask but a causal one, and enable_nested_tensor (the
    default), the tokens that are not padding pass the layers one after the other, so that time
    follows their number; then the output is put back, 0 at padding (torch's is 0 before the last
    norm in evaluation, and undefined in training). This holds in training too, and in eager code
    alone: under torch.compile, export and CUDA graphs nothing is removed. Constructor, parameters,
    state_dict and masks are torch's.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        first = self.layers[0]
        if not (
            isinstance(src, Tensor)
            and src.dim() == 3
            and all(untouched(layer, TransformerEncoderLayer) for layer in self.layers)
            and not (is_causal and mask is None)
            and first.self_attn._fits(src, src, src, src_key_padding_mask, mask, False)
            and all(
                layer.fits(src)
                and layer.self_attn.batch_first == first.self_attn.batch_first
                and layer.self_attn.num_heads == first.self_attn.num_heads
                for layer in self.layers
            )
        ):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        attn = first.self_attn
        batch_first = attn.batch_first
        causal = is_causal_mask(mask, is_causal, src.shape[1 if batch_first else 0])
        keys, packing = src_key_padding_mask, self._packing(src_key_padding_mask, mask, causal)
        if packing is not None and packing.nothing_hidden():
            keys = None
        x = src
        if packing is not None and packing.pays():
            x = packing.remove(x if batch_first else x.transpose(0, 1))
            for layer in self.layers:
                x = layer.run(x, None, causal, True, packing.cu_seqlens)
            x = packing.restore(x if self.norm is None else self.norm(x))
            return x if batch_first else x.transpose(0, 1)
        batch = src.shape[0 if batch_first else 1]
        merged, causal = merge_masks(keys, mask, causal, batch, attn.num_heads)
        for layer in self.layers:
            x = layer.run(x, merged, causal, batch_first)
        return x if self.norm is None else self.norm(x)

    def _packing(self, keys: Tensor | None, mask: Tensor | None, causal: bool) -> Packing | None:
        if (
            keys is None
            or keys.dtype is not torch.bool
            or not keys.numel()
            or not self.enable_nested_tensor
            or (mask is not None and not causal)
            or any(
                layer.self_attn.bias_k is not None or layer.self_attn.add_zero_attn
                for layer in self.layers
            )
            or not Packing.possible(keys)
        ):
            return None
        return Packing(~keys)


class TransformerDecoder(nn.TransformerDecoder):
    """torch.nn.TransformerDecoder; its layers, where they are fasttx's, do the work."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if tgt_is_causal is None and isinstance(tgt, Tensor) and tgt.dim() in (2, 3):
            batch_first = self.layers[0].self_attn.batch_first or tgt.dim() == 2
            size = tgt.shape[-2 if batch_first else 0]
            tgt_is_causal = is_causal_mask(tgt_mask, None, size)
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )


class Transformer(nn.Transformer):
    """torch.nn.Transformer of fasttx's layers. Constructor, initial values, parameters, state_dict
    and masks are torch's; a custom encoder or decoder stays as it is given."""

    @functools.wraps(nn.Transformer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        given = {id(a) for a in (*args, *kwargs.values())}
        for part in (self.encoder, self.decoder):
            if id(part) not in given:
                fast_classes(part)


def is_causal_mask(mask: Tensor | None, is_causal: bool | None, size: int) -> bool:
    """The hint where there is one; else whether mask [size, size] is the causal one, boolean or of
    0 and -inf. Its values are not read while tracing."""
    if is_causal is not None or mask is None:
        return bool(is_causal)
    if mask.shape != (size, size) or not Packing.possible(mask) or mask.requires_grad:
        return False
    hidden = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype is not torch.bool:
        hidden = torch.zeros_like(mask).masked_fill(hidden, -torch.inf)
    return torch.equal(mask, hidden)


_FASTER = {
    nn.LayerNorm: LayerNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerDecoder: TransformerDecoder,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
}
