"""Our parameters and their names, layouts and shapes in a Hugging Face folder."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .config import Config
from .families import FAMILIES
from .families.family import Family, PerHead, Rows, Transposed

__all__ = ["Stored", "stored"]


@dataclass(frozen=True)
class Stored:
    """One of our tensors in a folder: the tensors' names without the base model's prefix, their
    shapes, what `views` makes of ours, one for each in its stored order; base: whether a prefix
    belongs before them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    views: Callable[[Tensor], list[Tensor]]
    base: bool


def stored(model) -> Iterator[tuple[str, Stored]]:
    """(our name, its Stored) of every tensor of a model's state; shared ones once."""
    config, seen = model.config, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, _place(name, tensor, config, model.kind)


def _place(name: str, tensor: Tensor, config: Config, kind: str) -> Stored:
    rule, layer, ending = _rule(name, FAMILIES[config.family], config, kind)
    names = rule if isinstance(rule, Rows) else (rule,)
    base = not name.startswith("head.") or str(names[0]).startswith("{base}")
    names = tuple(str(n).replace("{i}", layer).removeprefix("{base}") + ending for n in names)
    if config.gated:
        for part, other in FAMILIES[config.family].gated.items():
            names = tuple(n.replace(part, other) for n in names)
    shape = tuple(tensor.shape)
    if isinstance(rule, Rows):
        each = shape[0] // len(names)
        shapes = ((each, *shape[1:]),) * len(names)
        return Stored(names, shapes, lambda t: list(t.split(each)), base)
    if isinstance(rule, Transposed):
        return Stored(names, (shape[::-1],), lambda t: [t.t()], base)
    if isinstance(rule, PerHead):
        split = (3, config.heads, config.head_dim)
        return Stored(names, (shape,), lambda t: [t.unflatten(0, split).transpose(0, 1)], base)
    return Stored(names, (shape,), lambda t: [t], base)


def _rule(name: str, family: Family, config: Config, kind: str) -> tuple[str, str, str]:
    """The rule for one of our names, its layer, and the ending that the rule leaves out."""
    if name.startswith("head."):
        rules, plain = family.heads[kind], name
    else:
        rules = family.names if config.shared else family.names | family.separate
        plain = name.removeprefix("transformer.")
        if config.topology != family.topology:
            plain = f"{config.topology}.{plain}"
    layer = re.search(r"\.layers\.(\d+)\.", plain)
    plain = re.sub(r"\.layers\.\d+\.", ".layers.{i}.", plain)
    number = layer[1] if layer else ""
    if plain in rules:
        return rules[plain], number, ""
    module, _, leaf = plain.rpartition(".")
    return rules[module], number, f".{leaf}"
