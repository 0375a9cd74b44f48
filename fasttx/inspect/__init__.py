"""Seeing inside a model: attention maps, rollout, embeddings and probabilities of a text, as
numbers, as PNGs and as one HTML page that needs no network. `pip install fasttx[train]` brings what
it needs; nothing is imported before use."""

import importlib

_WHERE = {
    "calls": ("Capture", "capture"),
    "inspection": ("Inspection", "look"),
    "maps": ("FULL", "GRID", "AttentionMaps"),
    "folder": ("load",),
    "page": ("html",),
    "files": ("write",),
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_NAMES)


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__():
    return [*globals(), *__all__]
