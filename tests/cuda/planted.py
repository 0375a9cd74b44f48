"""Kernels with planted bugs: copies of files of csrc, changed in a few places, compiled for the
emulator in place of the originals."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fasttx.op import OPS
from tests.emulator import instructions
from tests.emulator.build import ROOT

from .emulated import compiled, function_of


@dataclass(frozen=True)
class Bug:
    """In the file `path` of csrc, `old`, a statement or an expression there once, becomes `new`."""

    name: str
    path: str
    old: str
    new: str


class Planted:
    """The kernels of `sources` (of csrc) with all the bugs, one at a time or none."""

    def __init__(self, name: str, sources: list[str], bugs: list[Bug]):
        self.name, self.bugs = f"planted_{name}", {b.name: i + 1 for i, b in enumerate(bugs)}
        folder = ROOT / f"build/emulator-{self.name}/changed"
        texts = {b.path: (ROOT / "csrc" / b.path).read_text() for b in bugs}
        for number, bug in enumerate(bugs, 1):
            assert texts[bug.path].count(bug.old) == 1, f"{bug.path}: {bug.old}"
            chosen = f"emulator::planted == {number}"
            changed = f"({chosen} ? ({bug.new}) : ({bug.old}))"
            if bug.old.endswith(";"):
                changed = f"if ({chosen}) {{ {bug.new} }} else {{ {bug.old} }}"
            texts[bug.path] = texts[bug.path].replace(bug.old, changed)
        for file in folder.rglob("*"):  # of other bugs, earlier
            if file.is_file() and file.relative_to(folder).as_posix() not in texts:
                file.unlink()
        for path, text in texts.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.is_file() or file.read_text() != text:
                file.write_text(text)
        files = [(folder if s in texts else ROOT / "csrc") / s for s in sources]
        # -iquote comes before every -I.
        self.library = compiled(self.name, files, ("-iquote", str(folder)))

    @contextlib.contextmanager
    def bug(self, name: str | None, sm: int, eager: bool, seed: int) -> Iterator[None]:
        """backend="cuda" has this bug, on a card of compute capability sm."""
        before = {op: op.tables for op in OPS.values()}
        self.library.emulator_plant(self.bugs[name] if name else 0)
        self.library.emulator_compute_capability(sm)
        for op in before:
            op.tables = {**op.tables, "cpu": [self._row(r) for r in op.tables["cpu"]]}
        try:
            with instructions.mode(self.library, eager, seed):
                yield
        finally:
            for op, tables in before.items():
                op.tables = tables

    def _row(self, row):
        if row.backend != "cuda":
            return row
        ops = getattr(torch.ops, f"fasttx_{self.name}")
        there = hasattr(ops, row.target.removeprefix("native:"))
        return replace(row, function=function_of(row, self.name)) if there else row
