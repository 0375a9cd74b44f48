"""Which kernel of an op is the fastest for a call, where that was measured: data, not code.

fasttx/choices.json holds a list of entries by op. The first one that fits a call names the backend
that goes first in the op's table there; `Needs` still has the last word.

    {"card": "NVIDIA H200", "dtype": "bfloat16", "sizes": {"x.0": [1024, 65536]},
     "given": {"activation": [0], "residual": false}, "backend": "torch",
     "measured": {"ms": {"torch": 0.31, "triton": 0.36}, "commit": "...", "torch": "2.11.0"}}

sizes: bounds on dimensions, both included. given: the values that a number or flag may have, or
whether a tensor is there. An entry without its measurement is an error.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .kernel import Kernel, _dimension, short

CHOICES = Path(__file__).with_name("choices.json")


@functools.cache
def choices() -> dict[str, list[dict]]:
    return read(CHOICES.read_text())


def read(text: str) -> dict[str, list[dict]]:
    """op -> entries. Raises ValueError where one lacks its card, its backend or a measurement of
    that backend."""
    found = json.loads(text)
    for op, entries in found.items():
        for entry in entries:
            times = entry.get("measured", {}).get("ms", {})
            if "card" not in entry or min(times, key=times.get, default=None) != entry["backend"]:
                raise ValueError(
                    f"choices.json: an entry of {op} must name its card, the times measured there "
                    f"and as its backend the fastest of them, got {entry}"
                )
    return found


@functools.cache
def card_of(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def fastest(op: str, args: tuple, at: Mapping[str, int]) -> str | None:
    """The backend measured to be the fastest for this call; None where nothing was."""
    if not (entries := choices().get(op)):
        return None
    card = card_of(args[0].device)
    return next((e["backend"] for e in entries if e["card"] == card and fits(e, args, at)), None)


def fits(entry: dict, args: tuple, at: Mapping[str, int]) -> bool:
    if "dtype" in entry and entry["dtype"] != short(args[0].dtype):
        return False
    for key, (low, high) in entry.get("sizes", {}).items():
        name, dim = _dimension(key)
        if not low <= args[at[name]].shape[dim] <= high:
            return False
    for name, allowed in entry.get("given", {}).items():
        value = args[at[name]]
        if isinstance(allowed, bool):
            if (value is not None and value is not False) is not allowed:
                return False
        elif value not in allowed:
            return False
    return True


def promoted(table: list[Kernel], backend: str) -> list[Kernel]:
    """The table with this backend's kernels first, those too that are else chosen by name only."""
    first = [
        replace(k, needs=replace(k.needs, by_name=False)) for k in table if k.backend == backend
    ]
    return [*first, *(k for k in table if k.backend != backend)]
