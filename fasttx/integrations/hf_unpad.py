"""Encoders that run without the padding of their batch, for `patch(model, unpad=True)`."""

from torch import Tensor, nn
from transformers.utils import output_capturing

from ..layers.padding import Packing
from .hf_attention import why_eager
from .hf_families import NAME
from .hf_fused import HOOKS


def packing_of(encoder: nn.Module, visible: Tensor | None, given: dict) -> Packing | None:
    """The batch without its padding, from a mask [B,S] of the real tokens; None where it stays as
    it is: little is hidden, code is being traced, or something would see or needs the padded form
    (hooks, output_hidden_states, output_attentions, arguments not known, another attention)."""
    if visible is None or visible.dim() != 2 or not visible.numel():
        return None
    if not Packing.possible(visible) or _needs_padding(encoder, given) or not _blind(encoder):
        return None
    packing = Packing(visible.bool())
    return packing if packing.pays() else None


def bounds(packing: Packing) -> dict[str, Tensor]:
    """Packed sequences as transformers' attention functions are told of them."""
    return {"cu_seq_lens_q": packing.cu_seqlens, "cu_seq_lens_k": packing.cu_seqlens}


def records_like(base: type):
    """For a subclass of a transformers model: output_hidden_states and output_attentions collect
    what they do in base, which transformers looks up by the class's name."""

    def register(cls: type) -> type:
        registry = output_capturing._CAN_RECORD_REGISTRY
        dict.__setitem__(registry, str(cls), base._can_record_outputs)
        return cls

    return register


def _needs_padding(encoder: nn.Module, given: dict) -> bool:
    config = encoder.config

    def asked(name: str) -> bool:
        return getattr(config, name) if given.get(name) is None else given[name]

    return bool(
        why_eager(encoder, given)
        or asked("output_hidden_states")
        or "hidden_states" in (output_capturing._active_collector.get() or ())
        or not asked("return_dict")
        or getattr(config, "chunk_size_feed_forward", 0)
    )


def _blind(encoder: nn.Module) -> bool:
    """Nothing in it looks at the shape, and all its attention is fasttx's."""
    for module in encoder.modules():
        own = vars(module)
        if "forward" in own or _attention(own.get("config")) != NAME:
            return False
        if module is not encoder and any(map(_foreign, (own[hooks] for hooks in HOOKS))):
            return False
    return True


def _attention(config) -> str | None:
    return getattr(config, "_attn_implementation", NAME)


def _foreign(hooks: dict) -> bool:
    """Whether there are hooks other than those transformers collects outputs with, which stay on a
    model once they were asked for and do nothing while they are not."""
    return any(
        getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks.values()
    )
