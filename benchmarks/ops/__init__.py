"""One module an op, found by name: ``benchmarks/ops/<op>.py``.

``generic.py`` says what such a module holds and does the checking and timing for it; attention,
with its many features, has its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

HELPERS = {"generic", "attention_case", "attention_check"}


def names() -> tuple[str, ...]:
    found = {info.name for info in pkgutil.iter_modules(__path__)} - HELPERS
    return ("attention", *sorted(found - {"attention"}))


def find(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def cases(
    module: ModuleType,
    suite: str,
    dtypes: Sequence[str],
    sizes: Sequence[int] = (),
    shape: Sequence[int] = (),
) -> list:
    """A suite's cases of an op, or those of the lengths asked for, with shape (batch, heads, head
    size). LookupError for an op that has no lengths."""
    if sizes:
        if not hasattr(module, "sized_cases"):
            raise LookupError("it has no --seqlen")
        return module.sized_cases(tuple(dtypes), tuple(sizes), *shape)
    if suite == "full" and hasattr(module, "full_cases"):
        return module.full_cases(tuple(dtypes))
    return module.quick_cases(tuple(dtypes))
