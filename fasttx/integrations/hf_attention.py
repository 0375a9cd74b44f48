"""transformers' attention under the name "fasttx": the function and the masks that belong to it.

Importing this registers both. With the attention function alone transformers hands over no mask,
and padding would be silently ignored.

What a module receives as its mask:
    None               nothing is hidden, or plainly causal, aligned upper left, where it is causal
    [B|1, 1, 1, T]     bool: a padding mask over the keys, not expanded over the queries
    [B|1, 1, 1, 1, T]  bool: the same and causal, aligned lower right. Five dimensions, so that
                       nothing that does not know it can take it for a plain padding mask
    [B|1, H|1, S|1, T] bool (True: visible) or additive: a user's own, or any other pattern
"""

import functools
import inspect
import sys
import warnings

import torch
import transformers
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils import output_capturing
from transformers.utils.import_utils import is_tracing

from ..ops.attention import RelativePositionBias, attention
from .hf_families import CAUSAL_PADDING, CROSS_ATTENTION, NAME, PATCHED

# Arguments that do not change dense attention: bookkeeping, or in the mask already.
_INERT = {
    *("cache_position", "deterministic", "max_length_k", "max_length_q", "num_items_in_batch"),
    *("output_hidden_states", "output_router_logits", "position_ids", "return_dict", "use_cache"),
}


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_bias: RelativePositionBias | Tensor | bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scaling * query key^T + position_bias + mask) value, as transformers calls it.

    query [B,H,S,D], key and value [B,G,T,D] -> ([B,S,H,D], None); dropout in training only. Where
    the attention maps are asked for (output_attentions), and for an argument not known here, the
    model's own eager function runs instead: it gives the maps, and it knows what its model means.
    cu_seq_lens_q and cu_seq_lens_k (one row of packed sequences) keep the sequences apart, as they
    do under transformers' flash attention.

    Raises NotImplementedError for a paged cache and for a sliding window that reached no mask,
    ValueError for packed sequences together with a mask or in cross-attention.
    """
    causal = alignment(module, query.shape[2], attention_mask, is_causal)
    if attention_mask is not None and attention_mask.dim() == 5:
        attention_mask = attention_mask[:, 0]
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            f'attn_implementation="{NAME}" has no paged cache; use "sdpa" for continuous batching'
        )
    if sliding_window is not None and attention_mask is None and key.shape[2] > sliding_window:
        raise NotImplementedError(
            f"sliding_window={sliding_window} came without a mask that holds it, over "
            f'{key.shape[2]} keys; use another attn_implementation than "{NAME}" for this model'
        )
    packed = None
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        packed = _packed(module, query, key, attention_mask, cu_seq_lens_q, cu_seq_lens_k)
    if reason := why_eager(module, kwargs):
        if packed is not None:
            raise NotImplementedError(f"packed sequences cannot be combined with {reason}")
        function = _own_eager(module, reason)
        mask = additive_mask(attention_mask, causal, query.shape[2], key.shape[2], query)
        named = {
            "softcap": softcap,
            "sliding_window": sliding_window,
            "is_causal": is_causal,
            "position_bias": _dense(position_bias, query.shape[2], key.shape[2]),
        }
        kwargs.update((name, value) for name, value in named.items() if value is not None)
        return function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if isinstance(position_bias, Tensor):
        if not type(module).__module__.startswith("fasttx."):
            _tell_dense(type(module).__name__)
        attention_mask = _biased(position_bias, attention_mask)
        position_bias = None
    out = attention(
        query,
        key,
        value,
        attention_mask,
        dropout if module.training else 0.0,
        causal,
        scale=scaling,
        softcap=softcap,
        position_bias=position_bias or None,
        cu_seqlens=packed,
    )
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config=None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """The mask for `attention_forward` from a padding mask [B, keys] and a pattern (see above).

    Padding alone, or with a plain causal pattern, stays unexpanded; anything else (windows, chunks,
    overlays, packed positions, static caches) becomes transformers' dense boolean mask.
    """
    if attention_mask is not None and attention_mask.dim() == 5:
        return attention_mask
    if _is_deaf(config):
        return masking_utils.eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            config=config,
            device=device,
            **kwargs,
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be [batch, keys], or [batch, heads, queries, keys] to be taken as "
            f"it is, got shape {tuple(attention_mask.shape)}"
        )
    pattern = mask_function if local_size is None and not kwargs.get("use_vmap") else None
    if pattern is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip:
        padding = _padding(attention_mask, kv_length, kv_offset)
        return None if padding is None else padding[:, None, None, :]
    newest = (
        not isinstance(q_offset, Tensor) and kv_offset == 0 and q_offset + q_length == kv_length
    )
    if pattern is masking_utils.causal_mask_function and allow_is_causal_skip and newest:
        padding = _padding(attention_mask, kv_length, kv_offset)
        if padding is None and (q_length == 1 or q_offset == 0):
            return None
        if q_length == 1:
            return padding[:, None, None, :]
        if getattr(config, "model_type", None) in CAUSAL_PADDING:
            if padding is None:
                padding = torch.ones(1, kv_length, dtype=torch.bool, device=device)
            return padding[:, None, None, None, :]
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        config=config,
        device=device,
        **kwargs,
    )


def _padding(mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool [B, kv_length], True: seen. None where all are, which tracing cannot find out."""
    if mask is None:
        return None
    mask = masking_utils.prepare_padding_mask(mask, kv_length, kv_offset)
    mask = mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return None if not is_tracing(mask) and bool(mask.all()) else mask


def _is_deaf(config) -> bool:
    """An unpatched BLOOM, which adds whatever mask it gets and never calls `attention_forward`."""
    unpatched = getattr(config, "_attn_implementation", None) == NAME
    if unpatched and getattr(config, "model_type", None) == "bloom":
        _tell_deaf()
        return True
    return False


def alignment(
    module, queries: int, mask: Tensor | None, is_causal: bool | None = None
) -> str | bool:
    """What attention's is_causal must be for a mask as above.

    transformers' rule: causal if the call, else the module, says so and no mask is given."""
    if mask is not None and mask.dim() == 5:
        if mask.shape[1:4] != (1, 1, 1) or mask.dtype is not torch.bool:
            raise ValueError(
                "attention_mask of 5 dimensions must be bool [batch, 1, 1, 1, keys], got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
        return "lower_right"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and mask is None and not _is_cross(module) and queries > 1:
        return "upper_left"
    return False


def _is_cross(module) -> bool:
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name.removeprefix("transformers.models.") in CROSS_ATTENTION:
        return True
    if (cross := getattr(module, "is_cross_attention", None)) is not None:
        return cross
    return getattr(module, "is_decoder", False) and getattr(module, "is_causal", None) is False


def why_eager(module, kwargs: dict) -> str | None:
    """What only the model's own eager function knows of what was asked."""
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_attentions", False)
    if wanted or _captured():
        return "output_attentions"
    known = _INERT | {"output_attentions"}
    given = (name for name, v in kwargs.items() if v is not None and v is not False)
    return next((name for name in given if name not in known), None)


def _captured() -> bool:
    """Models that do not hand output_attentions down (GPT-2) have hooks collect the maps."""
    collected = output_capturing._active_collector.get()
    return collected is not None and any(key.endswith("attentions") for key in collected)


def _packed(module, query, key, attention_mask, cu_q, cu_k) -> tuple[Tensor, Tensor]:
    if attention_mask is not None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k cannot be combined with attention_mask")
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or _is_cross(module):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k need self-attention over one row of packed sequences, "
            f"got {type(module).__name__} with query {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    return cu_q, cu_k


def _own_eager(module, reason: str):
    """The eager_attention_forward of the file that defines module's class."""
    for base in type(module).__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            if reason != "output_attentions":
                _tell(type(module).__name__, reason)
            return function
    raise NotImplementedError(
        f'attn_implementation="{NAME}" does not support {reason}, and {type(module).__module__} '
        "has no eager_attention_forward to run instead"
    )


@functools.cache
def _tell(name: str, reason: str) -> None:
    warnings.warn(
        f'attn_implementation="{NAME}": {name} was given {reason}, which only its own eager '
        "attention knows; that runs instead, in O(queries x keys) memory",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _tell_dense(name: str) -> None:
    warnings.warn(
        f'attn_implementation="{NAME}": {name} makes a [1, heads, queries, keys] position bias; '
        "fasttx.patch(model) lets the kernel compute it",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _tell_deaf() -> None:
    warnings.warn(
        f'attn_implementation="{NAME}": BLOOM runs its own attention whatever the name; '
        "fasttx.patch(model) replaces it",
        RuntimeWarning,
        stacklevel=2,
    )


def additive_mask(
    mask: Tensor | None, causal: str | bool, S: int, T: int, like: Tensor
) -> Tensor | None:
    """The mask as transformers' eager functions take it: the least finite number where hidden."""
    if causal:
        newest = torch.arange(S, device=like.device)[:, None]
        newest = newest + (T - S if causal == "lower_right" else 0)
        band = torch.arange(T, device=like.device) <= newest
        mask = band[None, None] if mask is None else mask & band
    if mask is None or mask.dtype is not torch.bool:
        return mask
    zero = torch.zeros((), dtype=like.dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(like.dtype).min)


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _dense(bias, S: int, T: int) -> Tensor | None:
    """A position bias as transformers has it, [1, H, S, T]."""
    if not isinstance(bias, RelativePositionBias):
        return None if bias is False else bias
    offset = T - S if bias.query_offset is None else bias.query_offset
    device, far = bias.weight.device, bias.max_distance
    distance = torch.arange(T, device=device) - torch.arange(S, device=device)[:, None] - offset
    bucket = bias.buckets().long()[distance.clamp(-far, far) + far]
    return torch.nn.functional.embedding(bucket, bias.weight).permute(2, 0, 1)[None]


if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
    raise ImportError(f"fasttx needs transformers >= 5.4, found {transformers.__version__}")
for _name in (NAME, PATCHED):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, attention_mask)
