"""`patch(model)`: a transformers model runs fasttx's attention; `unpatch(model)` undoes it.

The attention of the families in hf_families.py reads its implementation from its config at every
call, so patching sets that name and nothing else: modules, parameters, names, hooks, state_dict
stay. What it was before is kept in the __dict__ of the transformers model that owns the attention,
so that copies and pickles of a patched model can be unpatched. Configs are shared as transformers
shares them: two models built on one config object are patched together.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass

from torch import nn

from .hf_families import ATTENTION, BERT_LIKE, NAME

_PREVIOUS = "_fasttx_previous"  # {name of the config's holder in its owner: implementation before}
_LARGEST_HEAD = 256


@dataclass(frozen=True)
class PatchEntry:
    """One attention module: its name, its class, and why it was not replaced (None: it was)."""

    name: str
    kind: str
    reason: str | None

    @property
    def replaced(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, repr=False)
class PatchReport:
    """What `patch` did, one entry an attention module, in the model's order; prints as a table."""

    model: str
    entries: tuple[PatchEntry, ...]

    @property
    def replaced(self) -> tuple[PatchEntry, ...]:
        return tuple(e for e in self.entries if e.replaced)

    @property
    def skipped(self) -> tuple[PatchEntry, ...]:
        return tuple(e for e in self.entries if not e.replaced)

    def __repr__(self) -> str:
        """Modules that differ only in the numbers of their names share a row."""
        rows = Counter((re.sub(r"\b\d+\b", "*", e.name), e.kind, e.reason) for e in self.entries)
        cells = [
            (name, f"{count} x {kind}", reason or "replaced")
            for (name, kind, reason), count in rows.items()
        ]
        wide = [max((len(cell[i]) for cell in cells), default=0) for i in range(2)]
        done, all_ = len(self.replaced), len(self.entries)
        lines = [f"{self.model}: {done} of {all_} attention modules run fasttx"]
        return "\n".join(lines + [f"  {a:{wide[0]}}  {b:{wide[1]}}  {c}" for a, b, c in cells])


def patch(model: nn.Module, *, strict: bool = False) -> PatchReport:
    """Make a Hugging Face model run fasttx's attention, in inference and training.

    model: a transformers model, or a module that contains some; BERT, RoBERTa and the families that
    share their attention (hf_families.py). Patching again changes nothing. With strict=True a model
    with an attention module that cannot be replaced, or with none at all, is left alone and
    NotImplementedError lists the reasons.

    Returns the report of what was replaced, what was not, and why. Raises TypeError for anything
    that is not such a module.

    >>> fasttx.patch(model)
    BertModel: 6 of 6 attention modules run fasttx
      encoder.layer.*.attention.self  6 x BertSelfAttention  replaced
    """
    found = [
        (prefix, name, module, owner, _why_not(module))
        for prefix, owner in _owners(model, "patch")
        for name, module in _attention(owner)
    ]
    # One config may serve several modules: the name in it is right for all of them or for none.
    blocked: dict[int, str] = {}
    for prefix, name, module, owner, reason in found:
        if reason is not None:
            text = f"shares its config with {_join(prefix, name)}, which cannot be replaced"
            blocked.setdefault(id(owner.config), text)
            blocked.setdefault(id(getattr(module, "config", owner.config)), text)
    entries, replaced = [], []
    for prefix, name, module, owner, reason in found:
        if reason is None:
            reason = blocked.get(id(module.config)) or blocked.get(id(owner.config))
        if reason is None:
            replaced.append((name, module, owner))
        entries.append(PatchEntry(_join(prefix, name), type(module).__name__, reason))
    report = PatchReport(type(model).__name__, tuple(entries))
    if strict and (report.skipped or not entries):
        why = report if entries else f"{report.model}: no attention module was found"
        raise NotImplementedError(f"fasttx.patch(strict=True) changed nothing\n{why}")
    if replaced:
        from . import hf_attention  # noqa: F401  (registers the name)
    for name, module, owner in replaced:
        # The attention reads its own config, the owner makes the masks by its own: maybe another.
        for holder, config in ((name, module.config), ("", owner.config)):
            if config._attn_implementation != NAME:
                previous = owner.__dict__.setdefault(_PREVIOUS, {})
                previous[holder] = config._attn_implementation
                _choose(config, NAME)
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every config gets the attention implementation it had before.

    A model that is not patched stays as it is, an implementation chosen after patching is kept.
    Raises TypeError as `patch` does.
    """
    for _, owner in _owners(model, "unpatch"):
        for holder, implementation in owner.__dict__.pop(_PREVIOUS, {}).items():
            config = owner.get_submodule(holder).config
            if config._attn_implementation == NAME:
                _choose(config, implementation)


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


def _attention(owner: nn.Module) -> list[tuple[str, nn.Module]]:
    """The innermost modules that are an ...Attention... by class, without those of inner models."""

    def walk(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        found = []
        for child_name, child in module.named_children():
            if not _is_model(child):
                found += walk(_join(name, child_name), child)
        named = any("Attention" in c.__name__ for c in type(module).__mro__)
        if not found and named and module is not owner:
            found.append((name, module))
        return found

    return walk("", owner)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _why_not(module: nn.Module) -> str | None:
    classes = [c for c in type(module).__mro__ if f"{c.__module__}.{c.__qualname__}" in ATTENTION]
    if not classes:
        return f"not in fasttx's table ({', '.join(BERT_LIKE)})"
    if type(module).forward is not classes[0].forward:
        return f"{type(module).__name__} overrides the forward of {classes[0].__name__}"
    # accelerate's wrapper, known by its _hf_hook, calls the forward that it stands for
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "its forward was replaced on the instance"
    if (size := module.attention_head_size) > _LARGEST_HEAD:
        return f"its head size {size} is above {_LARGEST_HEAD}, the kernels' largest"
    return None
