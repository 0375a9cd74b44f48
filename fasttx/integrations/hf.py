"""How `patch` treats transformers models.

Modules whose class is in hf_families.py become instances of a subclass of the same name in this
package; their parameters, names, hooks and state_dict stay. Attention that reads its implementation
from its config at every call gets that name and nothing else. The name it had before is kept in the
__dict__ of the transformers model that owns the attention, so that copies and pickles of a patched
model can be unpatched. Configs are shared as transformers shares them: two models built on one
config object are patched together.
"""

import importlib
import sys
from functools import partial

from torch import nn

from ..layers._fit import MAX_HEAD_SIZE
from .hf_families import ATTENTION, CLASSES, ENCODERS, FAMILIES, LOGITS, Attention
from .report import Found
from .torch_nn import is_listed

_PREVIOUS = "_fasttx_previous"  # {name of the config's holder in its owner: implementation before}
_HERE = f"{__package__}."


def plan(model: nn.Module, logits: bool, unpad: bool) -> list[Found]:
    """What `patch` would do to the transformers models in model."""
    found: list[Found] = []
    files = CLASSES | ENCODERS if unpad else CLASSES
    attention: dict[int, nn.Module] = {}  # place in found -> the model whose config names it
    for prefix, owner in _owners(model):
        reasons = {module: _why_not(module) for module in _attention(owner)}
        for name, module in _own_modules(owner):
            full = f"{prefix}.{name}".strip(".")
            if module in reasons:
                attention[len(found)] = owner
                choose = partial(_replace_attention, name, module, owner)
                found.append(Found(full, module, reasons[module], True, choose))
            elif owner.config.model_type in FAMILIES and _listed(module, files):
                cls = _original(type(module))
                swap = partial(_replace_module, module, files[_path(cls)], logits)
                found.append(Found(full, module, _why_not_swap(module, cls), False, swap))
    found = _agree(found, attention)
    return _with_encoders(model, found) if unpad else found


def _with_encoders(model: nn.Module, found: list[Found]) -> list[Found]:
    """An encoder can leave padding out if all its attention is fasttx's."""
    encoders = {i for i, f in enumerate(found) if _path(_original(type(f.module))) in ENCODERS}
    if not encoders:
        raise ValueError(
            f"fasttx.patch: unpad=True needs an encoder of BERT's kind, T5 or BART, and "
            f"{type(model).__name__} has none"
        )
    refused = {f.module for f in found if f.attention and f.reason is not None}
    return [
        f._replace(reason="some of its attention cannot be replaced")
        if i in encoders and f.reason is None and not refused.isdisjoint(f.module.modules())
        else f
        for i, f in enumerate(found)
    ]


def _agree(found: list[Found], attention: dict[int, nn.Module]) -> list[Found]:
    """One config may serve several attention modules: the name in it is right for all of them or
    for none."""

    def configs(i: int) -> tuple[int, int]:
        config = attention[i].config
        return id(config), id(getattr(found[i].module, "config", config))

    blocked: dict[int, str] = {}
    for i in attention:
        if found[i].reason is not None:
            text = f"shares its config with {found[i].name}, which cannot be replaced"
            for config in configs(i):
                blocked.setdefault(config, text)
    agreed = list(found)
    for i in attention:
        if found[i].reason is None:
            reason = next((blocked[c] for c in reversed(configs(i)) if c in blocked), None)
            agreed[i] = found[i]._replace(reason=reason)
    return agreed


def _replace_attention(name: str, module: nn.Module, owner: nn.Module) -> None:
    from . import hf_attention  # noqa: F401  (registers the names)

    _, known = _known(module)
    if known.module is not None:
        _swap(module, known.module)
    # The attention reads its own config, the owner makes the masks by its own: maybe another.
    for holder, config in ((name, getattr(module, "config", None)), ("", owner.config)):
        if config is not None and config._attn_implementation != known.name:
            previous = owner.__dict__.setdefault(_PREVIOUS, {})
            previous[holder] = config._attn_implementation
            _choose(config, known.name)


def _replace_module(module: nn.Module, file: str, logits: bool) -> None:
    _swap(module, file)
    if file == "hf_heads":
        vars(module).pop(LOGITS, None)
        if logits:
            vars(module)[LOGITS] = True


def restore(model: nn.Module) -> None:
    """Undo what `plan` did."""
    for _, owner in _owners(model):
        for holder, implementation in owner.__dict__.pop(_PREVIOUS, {}).items():
            config = owner.get_submodule(holder).config
            if config._attn_implementation in _NAMES:
                _choose(config, implementation)
        for module in owner.modules():
            if _is_ours(type(module)):
                module.__class__ = _original(type(module))
                vars(module).pop(LOGITS, None)


_NAMES = {attention.name for attention in ATTENTION.values()}


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(_HERE)


def _original(cls: type) -> type:
    return next(base for base in cls.__mro__ if not _is_ours(base))


def _swap(module: nn.Module, file: str) -> None:
    if _is_ours(type(module)):
        return
    ours = getattr(importlib.import_module(_HERE + file), type(module).__name__)
    if _original(ours) is not type(module):
        raise AssertionError(f"{ours} is no subclass of {type(module)}")
    module.__class__ = ours


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("transformers.models.")


def _known(module: nn.Module) -> tuple[type, Attention] | None:
    """(the class of the table that module is an instance of, what the table says of it)."""
    for cls in type(module).__mro__:
        if _path(cls) in ATTENTION:
            return cls, ATTENTION[_path(cls)]
    return None


def _listed(module: nn.Module, files: dict[str, str]) -> bool:
    """Whether module is exactly an instance of a class of files; for ENCODERS, an encoder."""
    path = _path(_original(type(module)))
    decodes = path in ENCODERS and module.config.is_decoder
    return path in files and not decodes


def _choose(config, implementation: str | None) -> None:
    """Set the implementation of this config and of none of its sub-configs."""
    config._attn_implementation = {"": implementation}


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the transformers models in model, outermost first."""
    return [(name, module) for name, module in model.named_modules() if is_model(module)]


def is_model(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def _own_modules(owner: nn.Module, name: str = "", module=None) -> list[tuple[str, nn.Module]]:
    """(name, module) of owner and what is in it, without inner models."""
    found = [(name, owner if module is None else module)]
    for child_name, child in found[0][1].named_children():
        if not is_model(child):
            found += _own_modules(owner, _join(name, child_name), child)
    return found


def _attention(owner: nn.Module) -> list[nn.Module]:
    """The innermost modules that are an ...Attention... by class, without those of inner models and
    torch.nn's own."""

    def walk(module: nn.Module) -> list[nn.Module]:
        found = [m for child in module.children() if not is_model(child) for m in walk(child)]
        named = any("Attention" in c.__name__ for c in type(module).__mro__)
        return found or ([module] if named and module is not owner else [])

    return [module for module in walk(owner) if not is_listed(module)]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _why_not(module: nn.Module) -> str | None:
    if (found := _known(module)) is None:
        return f"not in fasttx's table ({', '.join(FAMILIES)})"
    cls, known = found
    kind = _original(type(module))
    if kind.forward is not cls.forward:
        return f"{kind.__name__} overrides the forward of {cls.__name__}"
    if known.module is not None:
        if (reason := _why_not_swap(module, cls)) is not None:
            return reason
    # accelerate's wrapper, known by its _hf_hook, calls the forward that was there before it
    elif "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "its forward was replaced on the instance"
    if (size := getattr(module, known.head_size)) > MAX_HEAD_SIZE:
        return f"its head size {size} is above {MAX_HEAD_SIZE}, the kernels' largest"
    return None


def _why_not_swap(module: nn.Module, cls: type) -> str | None:
    if (kind := _original(type(module))) is not cls:
        return f"{kind.__name__} is a subclass of {cls.__name__}, the class that is replaced"
    if "forward" in vars(module) and not _is_ours(type(module)):
        if hasattr(module, "_hf_hook"):
            return "accelerate's hook holds its forward: patch the model before it is dispatched"
        return "its forward was replaced on the instance"
    return None
