"""Who is measured beside fasttx. A provider is one module here, found by import.

A provider module has ``NAME`` (how rows and ``--provider`` call it), ``LABEL`` (for people),
``COMPILES`` (its first call compiles), ``reason()`` (None, or why it cannot be used here) and what
it does: ``attention(case, x, check) -> (call, leaves)``, where ``call()`` computes the op on the
tensors of ``x``; ``op(case) -> function of the inputs``, or None, for a case of any other op;
``model_forward(model, batch, threads) -> call`` for a whole model of transformers,
``generation(model, dtype, ids, tokens, threads) -> (call, scores)`` for one that generates. They
raise :class:`Skip` where the provider does not do such a case. A module with several providers
lists them in ``PROVIDERS``. ``EXTRA``: only with ``--full`` or by name. ``NO_BACKWARD``: the device
types on which its attention has none. ``NOTES``: what a reader of its rows must know.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

ORDER = ("fasttx", "sdpa", "eager", "torch_compile")


class Skip(Exception):
    """This provider does not do this case; the message says why."""


@contextmanager
def theirs() -> Iterator[None]:
    """Around another library's code: whatever it fails with, it sits the case out in its words."""
    try:
        yield
    except Skip:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise Skip(f"{type(error).__name__}: {first}") from error


def find() -> dict[str, ModuleType]:
    """Every provider module by name, the known ones first; usable or not (ask ``reason()``)."""
    names = {info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")}
    ordered = [name for name in ORDER if name in names] + sorted(names - set(ORDER))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in ordered]
    every = [provider for m in modules for provider in getattr(m, "PROVIDERS", [m])]
    return {provider.NAME: provider for provider in every}
