"""What `patch` tells of its work."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class Found(NamedTuple):
    """A module that `patch` knows or has to refuse: its name in the model, why it is refused (None:
    it is not), whether it is attention, and what replaces it."""

    name: str
    module: nn.Module
    reason: str | None
    attention: bool
    replace: Callable[[], None]


@dataclass(frozen=True)
class PatchEntry:
    """One module: its name, its class, and why it was not replaced (None: it was)."""

    name: str
    kind: str
    reason: str | None

    @property
    def replaced(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, repr=False)
class PatchReport:
    """What `patch` did, one entry a module it knows or has to refuse, in the model's order; prints
    as a table."""

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
            (name or "(the model itself)", f"{count} x {kind}", reason or "replaced")
            for (name, kind, reason), count in rows.items()
        ]
        wide = [max((len(cell[i]) for cell in cells), default=0) for i in range(2)]
        lines = [f"{self.model}: {len(self.replaced)} of {len(self.entries)} modules run fasttx"]
        return "\n".join(lines + [f"  {a:{wide[0]}}  {b:{wide[1]}}  {c}" for a, b, c in cells])
