"""`patch(model)`: a transformers model runs fasttx's kernels; `unpatch(model)` undoes it.

Modules whose class is in hf_families.py become instances of a subclass of the same name in this
package; their parameters, names, hooks and state_dict stay. Attention that reads its implementation
from its config at every call gets that name and nothing else. The name it had before is kept in the
__dict__ of the transformers model that owns the attention, so that copies and pickles of a patched
model can be unpatched. Configs are shared as transformers shares them: two models built on one
config object are patched together.
"""

import importlib
import sys

from torch import nn

from .hf_families import ATTENTION, CLASSES, FAMILIES, LOGITS, Attention
from .hf_report import PatchEntry, PatchReport

_PREVIOUS = "_fasttx_previous"  # {name of the config's holder in its owner: implementation before}
_LARGEST_HEAD = 256
_HERE = f"{__package__}."


def patch(model: nn.Module, *, strict: bool = False, logits: bool = False) -> PatchReport:
    """Make a Hugging Face model run fasttx's kernels, in inference and training.

    model: a transformers model, or a module that contains some; BERT and RoBERTa with the families
    that share their attention, GPT-2, BART, T5, BLOOM and Llama (hf_families.py). Patching again
    changes nothing. With strict=True a model with a module that cannot be replaced, or with no
    attention at all, is left alone and NotImplementedError lists the reasons. A language model that
    is given labels in training returns the loss and no logits (None), which saves their memory and
    time; with logits=True, and always in evaluation, it returns both.

    Returns the report of what was replaced, what was not, and why. Raises TypeError for anything
    that is not such a module.

    >>> fasttx.patch(model)
    BertModel: 6 of 6 modules run fasttx
      encoder.layer.*.attention.self  6 x BertSelfAttention  replaced
    """
    entries, attention, others = [], [], []
    for prefix, owner in _owners(model, "patch"):
        found = {module: _why_not(module) for module in _attention(owner)}
        for name, module in _own_modules(owner):
            if module in found:
                entries.append((_join(prefix, name), module, owner, found[module]))
                attention.append((name, module, owner, len(entries) - 1))
            elif owner.config.model_type in FAMILIES and (cls := _listed(module)) is not None:
                reason = _why_not_swap(module, cls)
                entries.append((_join(prefix, name), module, owner, reason))
                if reason is None:
                    others.append((module, CLASSES[_path(cls)]))
    entries = _agree(entries, {i for *_, i in attention})
    report = PatchReport(
        type(model).__name__,
        tuple(
            PatchEntry(name, type(module).__name__, reason) for name, module, _, reason in entries
        ),
    )
    if strict and (report.skipped or not attention):
        why = report if attention else f"{report.model}: no attention module was found"
        raise NotImplementedError(f"fasttx.patch(strict=True) changed nothing\n{why}")
    attention = [(name, module, owner) for name, module, owner, i in attention if not entries[i][3]]
    if attention:
        from . import hf_attention  # noqa: F401  (registers the names)
    for name, module, owner in attention:
        _, known = _known(module)
        if known.module is not None:
            _swap(module, known.module)
        # The attention reads its own config, the owner makes the masks by its own: maybe another.
        for holder, config in ((name, getattr(module, "config", None)), ("", owner.config)):
            if config is not None and config._attn_implementation != known.name:
                previous = owner.__dict__.setdefault(_PREVIOUS, {})
                previous[holder] = config._attn_implementation
                _choose(config, known.name)
    for module, file in others:
        _swap(module, file)
        if file == "hf_heads":
            vars(module).pop(LOGITS, None)
            if logits:
                vars(module)[LOGITS] = True
    return report


def _agree(entries: list[tuple], attention: set[int]) -> list[tuple]:
    """One config may serve several attention modules: the name in it is right for all of them or
    for none."""
    blocked: dict[int, str] = {}
    for i, (name, module, owner, reason) in enumerate(entries):
        if i in attention and reason is not None:
            text = f"shares its config with {name}, which cannot be replaced"
            blocked.setdefault(id(owner.config), text)
            blocked.setdefault(id(getattr(module, "config", owner.config)), text)
    agreed = []
    for i, (name, module, owner, reason) in enumerate(entries):
        if i in attention and reason is None:
            config = getattr(module, "config", owner.config)
            reason = blocked.get(id(config)) or blocked.get(id(owner.config))
        agreed.append((name, module, owner, reason))
    return agreed


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module gets its class and every config the attention implementation it
    had before.

    A model that is not patched stays as it is, an implementation chosen after patching is kept.
    Raises TypeError as `patch` does.
    """
    for _, owner in _owners(model, "unpatch"):
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


def _listed(module: nn.Module) -> type | None:
    """The class in CLASSES of which module is exactly an instance."""
    cls = _original(type(module))
    return cls if _path(cls) in CLASSES else None


def _choose(config, implementation: str | None) -> None:
    """Set the implementation of this config and of none of its sub-configs."""
    config._attn_implementation = {"": implementation}


def _owners(model, caller: str) -> list[tuple[str, nn.Module]]:
    """(name, module) of the transformers models in model, outermost first."""
    if isinstance(model, type):
        raise TypeError(f"fasttx.{caller}: model must be an instance, got the class {model}")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fasttx.{caller}: model must be a transformers model or a module with one in it, "
            f"got {type(model).__name__}"
        )
    owners = [(name, module) for name, module in model.named_modules() if _is_model(module)]
    if not owners:
        raise TypeError(
            f"fasttx.{caller}: model must be a transformers model or a module with one in it, "
            f"got {type(model).__module__}.{type(model).__qualname__} without any PreTrainedModel"
        )
    return owners


def _is_model(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def _own_modules(owner: nn.Module, name: str = "", module=None) -> list[tuple[str, nn.Module]]:
    """(name, module) of owner and what is in it, without inner models."""
    found = [(name, owner if module is None else module)]
    for child_name, child in found[0][1].named_children():
        if not _is_model(child):
            found += _own_modules(owner, _join(name, child_name), child)
    return found


def _attention(owner: nn.Module) -> list[nn.Module]:
    """The innermost modules that are an ...Attention... by class, without those of inner models."""

    def walk(module: nn.Module) -> list[nn.Module]:
        found = [m for child in module.children() if not _is_model(child) for m in walk(child)]
        named = any("Attention" in c.__name__ for c in type(module).__mro__)
        return found or ([module] if named and module is not owner else [])

    return walk(owner)


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
    if (size := getattr(module, known.head_size)) > _LARGEST_HEAD:
        return f"its head size {size} is above {_LARGEST_HEAD}, the kernels' largest"
    return None


def _why_not_swap(module: nn.Module, cls: type) -> str | None:
    if (kind := _original(type(module))) is not cls:
        return f"{kind.__name__} is a subclass of {cls.__name__}, the class that is replaced"
    if "forward" in vars(module) and not _is_ours(type(module)):
        if hasattr(module, "_hf_hook"):
            return "accelerate's hook holds its forward: patch the model before it is dispatched"
        return "its forward was replaced on the instance"
    return None
