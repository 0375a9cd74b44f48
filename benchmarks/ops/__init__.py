"""One module an op, found by name: ``benchmarks/ops/<op>.py``.

``generic.py`` says what such a module holds and does the checking and timing for it; attention,
with its many features, has its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

HELPERS = {"generic", "attention_case", "attention_check"}


def names() -> tuple[str, ...]:
    found = {info.name for info in pkgutil.iter_modules(__path__)} - HELPERS
    return ("attention", *sorted(found - {"attention"}))


def find(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
