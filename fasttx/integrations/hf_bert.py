"""The modules of BERT and of the families that share its code as `patch` runs them.

One text serves all of them: a class of this module is made when it is first asked for, a subclass
of transformers' class of the same name.
"""

import importlib

from torch import Tensor

from .hf_families import BERT_POST_NORM
from .hf_fused import dropout_p, residual_norm


class _Output:
    """dense, then LayerNorm(residual + dropout(it)) in one pass: ...SelfOutput and ...Output."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if (p := dropout_p(self.dropout)) is None:
            return super().forward(hidden_states, input_tensor)
        return residual_norm(self.LayerNorm, self.dense(hidden_states), input_tensor, p)


_KINDS = {"SelfOutput": _Output, "Output": _Output}


def __getattr__(name: str) -> type:
    for module, prefix in BERT_POST_NORM:
        kind = name.removeprefix(prefix)
        if kind in _KINDS and name == prefix + kind:
            base = getattr(importlib.import_module(f"transformers.models.{module}"), name)
            made = type(name, (_KINDS[kind], base), {"__module__": __name__, "__doc__": None})
            return globals().setdefault(name, made)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
