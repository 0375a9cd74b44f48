"""The record of a GPU's runs: one JSON, written after every item, resumed by the next run."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = "fasttx-gpu/1"
STATUSES = ("ok", "failed", "refused")


@dataclass(frozen=True)
class Item:
    """One thing to do. `function` is "module:name", called with `arguments` in a process of its
    own, which returns a dict for the record; `reproduce` is a shell line that does it again."""

    part: str
    key: str
    function: str
    arguments: dict[str, Any]
    reproduce: str
    seconds: float = 300.0


@dataclass
class Outcome:
    """status: ok, failed, or refused (the device or the driver said no). failures: what went
    wrong in detail, each {"what", "message", "reproduce"}."""

    part: str
    status: str
    seconds: float
    reproduce: str
    message: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    at: str = ""


class RecordError(ValueError):
    """A record that cannot be resumed: one line saying why and what to do."""


class Record:
    def __init__(self, path: Path, machine: dict[str, Any]):
        self.path, self.machine = path, machine
        self.outcomes: dict[str, Outcome] = {}
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        try:
            data = json.loads(self.path.read_text())
            before = data["machine"]["commit"]
            outcomes = {k: Outcome(**o) for k, o in data["items"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"{self.path} is no record of {SCHEMA} ({error}): move it away or give "
                "another --out"
            ) from None
        now = self.machine["commit"]
        if before != now:
            raise RecordError(
                f"{self.path} was made at commit {before}, this is {now}: give --again to start "
                "it anew, or another --out"
            )
        self.outcomes = outcomes

    def add(self, key: str, outcome: Outcome) -> None:
        outcome.at = datetime.now(UTC).isoformat(timespec="seconds")
        self.outcomes[key] = outcome
        self.write()

    def write(self) -> None:
        items = {key: asdict(o) for key, o in self.outcomes.items()}
        data = {"schema": SCHEMA, "machine": self.machine, "items": items}
        write_atomically(self.path, json.dumps(data, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
