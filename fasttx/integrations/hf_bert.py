"""The modules of BERT and of the families that share its code as `patch` runs them.

One text serves all of them: a class of this module is made when it is first asked for, a subclass
of transformers' class of the same name.
"""

import importlib

import torch
from torch import Tensor

from .hf_families import BERT_POST_NORM
from .hf_fused import dropout_p, feed_forward, is_plain, residual_norm
from .hf_unpad import bounds, packing_of


class _Output:
    """dense, then LayerNorm(residual + dropout(it)) in one pass: ...SelfOutput and ...Output."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if (p := dropout_p(self.dropout)) is None:
            return super().forward(hidden_states, input_tensor)
        return residual_norm(self.LayerNorm, self.dense(hidden_states), input_tensor, p)


class _Layer:
    """The feed-forward layer across its two submodules."""

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        inner, outer = self.intermediate, self.output
        if is_plain(inner, self._inner) and is_plain(outer, *self._outer):
            x = feed_forward(attention_output, inner.dense, inner.intermediate_act_fn, outer.dense)
            if x is not None and (p := dropout_p(outer.dropout)) is not None:
                return residual_norm(outer.LayerNorm, x, attention_output, p)
        return super().feed_forward_chunk(attention_output)


class _Encoder:
    """All layers without the padding; 0 at padding."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        packing, mask = None, attention_mask
        padding = (hidden_states.shape[0], 1, 1, hidden_states.shape[1])
        if not args and mask is not None and mask.dtype is torch.bool and mask.shape == padding:
            packing = packing_of(self, mask[:, 0, 0], kwargs)
        if packing is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        found = super().forward(packing.remove(hidden_states), **bounds(packing), **kwargs)
        found.last_hidden_state = packing.restore(found.last_hidden_state)
        return found


_KINDS = {"SelfOutput": _Output, "Output": _Output, "Layer": _Layer, "Encoder": _Encoder}


def __getattr__(name: str) -> type:
    for module, prefix in BERT_POST_NORM:
        kind = name.removeprefix(prefix)
        if kind in _KINDS and name == prefix + kind:
            theirs = importlib.import_module(f"transformers.models.{module}")
            body = {"__module__": __name__, "__doc__": None}
            if kind == "Layer":
                body["_inner"] = getattr(theirs, f"{prefix}Intermediate")
                body["_outer"] = (
                    getattr(theirs, f"{prefix}Output"),
                    __getattr__(f"{prefix}Output"),
                )
            made = type(name, (_KINDS[kind], getattr(theirs, name)), body)
            return globals().setdefault(name, made)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
