"""How `patch` treats torch.nn's Transformers: exactly torch's class becomes fasttx.nn's subclass of
it, which needs no attribute more. A mark in the module's __dict__ tells a patched module from one
that was built as fasttx.nn's, in copies and pickles too."""

from functools import partial

from torch import nn

from .. import layers
from ..layers._fit import MAX_HEAD_SIZE
from .report import Found

_ATTENTION = {nn.MultiheadAttention: layers.MultiheadAttention}
_STACKS = {
    nn.TransformerDecoder: layers.TransformerDecoder,
    nn.TransformerDecoderLayer: layers.TransformerDecoderLayer,
    nn.TransformerEncoder: layers.TransformerEncoder,
    nn.TransformerEncoderLayer: layers.TransformerEncoderLayer,
}
_NORMS = {nn.LayerNorm: layers.LayerNorm, nn.RMSNorm: layers.RMSNorm}
_TRANSFORMERS = _ATTENTION | _STACKS
_FASTER = _TRANSFORMERS | _NORMS
_PREVIOUS = "_fasttx_class"


def is_listed(module: nn.Module) -> bool:
    """Whether module is one of torch.nn's transformer classes, or a subclass of one."""
    return isinstance(module, tuple(_TRANSFORMERS))


def plan(model: nn.Module, others: list[nn.Module]) -> list[Found]:
    """What `patch` would do to torch.nn's transformer modules in model, and to the norms inside
    those and outside the models in others."""
    theirs = {module for other in others for module in other.modules()}
    inside = {m for listed in model.modules() if is_listed(listed) for m in listed.modules()}
    found = []
    for name, module in model.named_modules():
        kind = vars(module).get(_PREVIOUS, type(module))
        norm = kind in _NORMS and (module in inside or module not in theirs)
        if norm or (is_listed(module) and kind not in _FASTER.values()):
            replace = partial(_replace, module)
            found.append(Found(name, module, _why_not(module, kind), kind in _ATTENTION, replace))
    return found


def restore(model: nn.Module) -> None:
    """Undo what `plan` did."""
    for module in model.modules():
        module.__class__ = vars(module).pop(_PREVIOUS, type(module))


def _replace(module: nn.Module) -> None:
    if _PREVIOUS not in vars(module):
        vars(module)[_PREVIOUS] = type(module)
        module.__class__ = _FASTER[type(module)]


def _why_not(module: nn.Module, kind: type) -> str | None:
    if kind not in _FASTER:
        base = next(c for c in kind.__mro__ if c in _FASTER)
        return f"{kind.__name__} is a subclass of {base.__name__}, the class that is replaced"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if kind in _ATTENTION and (size := module.head_dim) > MAX_HEAD_SIZE:
        return f"its head size {size} is above {MAX_HEAD_SIZE}, the kernels' largest"
    return None
