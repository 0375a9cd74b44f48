"""Which kernel of an op is the fastest for a call, where that was measured: data, not code.

The first entry that fits a call names the backend that goes first in the op's table there; `Needs`
still has the last word. Entries come from tables (fasttx/choice_tables.py): the user's, made by
`fasttx tune`, for the ops that it measured on this many threads, and the committed one for the
others. FASTTX_TUNE=0 leaves both alone.

What fits: dtypes of arguments; sizes, bounds on dimensions, both included ("x.0", "x.-1",
"x.rows" the product of all dimensions but the last, "x.numel" of all); given, the values that a
number or flag may have, or whether a tensor is there; layout, how a tensor lies in memory: "rows"
(its last dimension is contiguous), "columns" (the one before is), "other".
"""

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from . import choice_tables, machine
from .kernel import Kernel, short

_NUMBERS = (int, float, bool)
MOST_KNOWN = 4096
_DTYPES = {short(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True)
class Choice:
    """An entry ready for calls; arguments by number. of: words about its measurement."""

    backend: str
    threads: int
    dtypes: tuple[tuple[int, torch.dtype], ...]
    sizes: tuple[tuple[int, str, int, int], ...]
    given: tuple[tuple[int, bool | tuple], ...]
    layout: tuple[tuple[int, str], ...]
    of: str

    def fits(self, args: tuple) -> bool:
        if self.threads and torch.get_num_threads() != self.threads:
            return False
        for i, dtype in self.dtypes:
            if args[i] is None or args[i].dtype is not dtype:
                return False
        for i, dim, low, high in self.sizes:
            if args[i] is None or not low <= size(args[i], dim) <= high:
                return False
        for i, allowed in self.given:
            value = args[i]
            if isinstance(allowed, bool):
                if (value is not None and value is not False) is not allowed:
                    return False
            elif isinstance(value, torch.Tensor) or value not in allowed:
                return False
        return all(args[i] is not None and layout(args[i]) == how for i, how in self.layout)


class Choices:
    """An op's choices on a device. What was found for a call is kept by what the choices look at:
    two microseconds, however many there are."""

    def __init__(self, found: tuple[Choice, ...]):
        self.all = found
        self.shapes = sorted({i for c in found for i, *_ in c.sizes})
        self.dtypes = sorted({i for c in found for i, _ in c.dtypes})
        self.strides = sorted({i for c in found for i, _ in c.layout})
        self.given = sorted({i for c in found for i, _ in c.given})
        self.known: dict[tuple, Choice | None] = {}

    def __call__(self, args: tuple) -> Choice | None:
        """The first that fits."""
        try:
            key = (
                torch.get_num_threads(),
                *[args[i].shape for i in self.shapes],
                *[args[i].dtype for i in self.dtypes],
                *[args[i].stride() for i in self.strides],
                *[
                    v if type(v := args[i]) in _NUMBERS else v is not None and v is not False
                    for i in self.given
                ],
            )
            return self.known[key]
        except (AttributeError, TypeError):  # no tensor where some choice has one; symbolic sizes
            return self._first(args)
        except KeyError:
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            found = self.known[key] = self._first(args)
            return found

    def _first(self, args: tuple) -> Choice | None:
        return next((c for c in self.all if c.fits(args)), None)


def size(t: torch.Tensor, dim: str) -> int:
    """-1 for a dimension that it does not have."""
    if dim == "numel":
        return t.numel()
    shape = t.shape
    if dim == "rows":
        return shape[:-1].numel() if shape else -1
    at = int(dim)
    return shape[at] if -len(shape) <= at < len(shape) else -1


def layout(t: torch.Tensor) -> str:
    if not t.dim() or t.stride(-1) == 1:
        return "rows"
    return "columns" if t.dim() > 1 and t.stride(-2) == 1 else "other"


@dataclass(frozen=True)
class Tables:
    """What was read: the tables, and what to say of the user's file where it does not count."""

    committed: tuple[dict, ...]
    users: tuple[dict, ...]
    damaged: str | None = None


@functools.cache
def tables() -> Tables:
    """Both files, read once a process. A damaged file of the user is ignored with a warning."""
    if os.environ.get("FASTTX_TUNE") == "0":
        return Tables((), ())
    committed = tuple(choice_tables.read(choice_tables.COMMITTED.read_text()))
    try:
        path = choice_tables.user_file()
        return Tables(committed, tuple(choice_tables.read_user(path)))
    except FileNotFoundError:  # a user without a home
        return Tables(committed, ())
    except ValueError as error:
        damaged = f"{path} is ignored: {error}. `fasttx tune` writes it anew"
        warnings.warn(damaged, RuntimeWarning, stacklevel=2)
        return Tables(committed, (), damaged)


def counts(table: dict, here: str, users: bool) -> bool:
    """Whether a table was measured on this machine, with these versions."""
    from . import __version__

    same = table["machine"] == here and _release(table["torch"]) == _release(torch.__version__)
    return same and (not users or table["fasttx"] == __version__)


def _release(version: str) -> list[str]:
    """2.13 of torch's 2.13.0+cpu."""
    return version.split(".")[:2]


def place(device: torch.device) -> str:
    """The machine that tables name: the processor's class, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return machine.cpu_class() if device.type == "cpu" else device.type


@functools.cache
def _tables_of(op: str, device: torch.device) -> tuple[tuple[dict, str], ...]:
    """(table, whose) that may hold an entry of the op on this device, the user's first. A user's
    measurement of an op stands in the place of the committed one, on its number of threads."""
    found = tables()
    if not any(op in t["ops"] for t in (*found.users, *found.committed)):
        return ()
    here = place(device)
    users = [t for t in found.users if op in t["ops"] and counts(t, here, True)]
    measured = {t["threads"] for t in users}
    committed = [
        t
        for t in found.committed
        if op in t["ops"] and t["threads"] not in measured and counts(t, here, False)
    ]
    path = str(choice_tables.user_file()) if users else ""
    return *((t, path) for t in users), *((t, "fasttx's own table") for t in committed)


@functools.cache
def _choices(op: str, device: torch.device, at: tuple[str, ...]) -> Choices:
    found = []
    for table, whose in _tables_of(op, device):
        if unknown := {n for e in table["ops"][op] for n in _named(e)} - set(at):
            warnings.warn(
                f"a table of choices is ignored for {op} ({whose}): the op has no argument "
                f"{', '.join(sorted(unknown))}",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        found += [_choice(entry, table, whose, at) for entry in table["ops"][op]]
    return Choices(tuple(found))


def _named(entry: dict) -> set[str]:
    sizes = {key.partition(".")[0] for key in entry.get("sizes", {})}
    return sizes.union(*(entry.get(key, {}) for key in ("dtypes", "given", "layout")))


def _choice(entry: dict, table: dict, whose: str, at: tuple[str, ...]) -> Choice:
    def argument(name: str) -> int:
        return at.index(name)

    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in entry["ms"].items())
    gain, low, high = entry["gain"]
    threads = f", {table['threads']} thr." if table["threads"] else ""
    return Choice(
        entry["backend"],
        table["threads"],
        tuple((argument(name), _DTYPES[dtype]) for name, dtype in entry.get("dtypes", {}).items()),
        tuple(
            (argument(key.partition(".")[0]), key.partition(".")[2], low, high)
            for key, (low, high) in entry.get("sizes", {}).items()
        ),
        tuple(
            (argument(name), allowed if isinstance(allowed, bool) else tuple(allowed))
            for name, allowed in entry.get("given", {}).items()
        ),
        tuple((argument(name), how) for name, how in entry.get("layout", {}).items()),
        f"measured {gain:.2f}x [{low:.2f}, {high:.2f}] as fast ({times}{threads}): {whose}, "
        f"{table.get('date', 'no date')}",
    )


def choices(op: str, device: torch.device, at: Mapping[str, int]) -> Choices | None:
    """Every choice of an op on a device, in their order; at: its arguments' names. None where there
    is none, which is known without the names."""
    found = _choices(op, device, tuple(at)) if _tables_of(op, device) else None
    return found if found and found.all else None


def chosen(op: str, args: tuple, at: Mapping[str, int]) -> Choice | None:
    """The choice that fits a call; None where nothing was measured for it."""
    found = choices(op, args[0].device, at)
    return found(args) if found else None


def fastest(op: str, args: tuple, at: Mapping[str, int]) -> str | None:
    """The backend measured to be the fastest for this call; None where nothing was."""
    found = chosen(op, args, at)
    return None if found is None else found.backend


def promoted(table: list[Kernel], backend: str) -> list[Kernel]:
    """The table with this backend's kernels first, those too that are else chosen by name only."""
    first = [
        replace(k, needs=replace(k.needs, by_name=False)) for k in table if k.backend == backend
    ]
    return [*first, *(k for k in table if k.backend != backend)]


def asked(op, call: Callable | None) -> Callable | None:
    """call, a direct call of the first kernel of an op; where choices were measured on this CPU it
    gives NotImplemented for what they give to another kernel."""
    found = choices(op.name, torch.device("cpu"), op.at)
    first = op.tables["cpu"][0].backend
    if call is None or found is None or all(c.backend == first for c in found.all):
        return call

    def choosing(args: tuple):
        best = found(args)
        return call(args) if best is None or best.backend == first else NotImplemented

    return choosing


def forget() -> None:
    """Read the tables again at the next call."""
    from .op import OPS

    for cached in (tables, _tables_of, _choices):
        cached.cache_clear()
    for op in OPS.values():
        op.direct, op.promoted = {}, {}
