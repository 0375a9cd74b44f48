"""Tables of choices as files: fasttx's own, and what `fasttx tune` measured for this user.

    {"schema": "fasttx-choices/1",
     "tables": [{"machine": "cpu-amd-zen5-avx512_bf16", "threads": 1, "fasttx": "0.1.0",
                 "torch": "2.13.0", "commit": "0123456789ab", "date": "2026-11-23",
                 "ops": {"linear_fwd": [ENTRY, ...]}}]}

machine: `fasttx.machine.cpu_class()`, or the name of a GPU, where threads is 0. A table counts only
for its machine, its number of threads and its torch, a user's only for its fasttx too. ops names
every op that was measured, with no entry where its first kernel was the fastest everywhere. An
entry, one shape class (fasttx/choice.py says what fits):

    {"dtypes": {"x": "float32"}, "sizes": {"x.0": [1, 1], "weight.0": [2048, 4095]},
     "given": {"activation": [0], "residual": false}, "layout": {"weight": "columns"},
     "backend": "torch", "ms": {"cpu": 24.1, "torch": 8.5}, "gain": [2.83, 2.71, 2.9],
     "cases": ["1x4096x12288 transposed weight fp32"]}

ms: median times of the first of its cases. gain: the least gain among them, a ratio with its 95 %
interval.
"""

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

SCHEMA = "fasttx-choices/1"
COMMITTED = Path(__file__).with_name("choices.json")
LEAST_GAIN = 1.03
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("rows", "columns", "other")
BACKENDS = ("cpu", "cuda", "triton", "torch")
_SIZE = re.compile(r"[a-z_0-9]+\.(-?\d|rows|numel)")


def cache_folder() -> Path:
    """FASTTX_CACHE, else fasttx in XDG_CACHE_HOME, else ~/.cache/fasttx. OSError where the user has
    no home."""
    if chosen := os.environ.get("FASTTX_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fasttx"
    try:
        return Path.home() / ".cache" / "fasttx"
    except RuntimeError as error:
        raise FileNotFoundError(f"set FASTTX_CACHE: {error}") from None


def user_file() -> Path:
    return cache_folder() / "choices.json"


def read(text: str) -> list[dict]:
    """The tables of a file. ValueError says what is wrong with it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    tables = data.get("tables")
    if not isinstance(tables, list):
        raise ValueError("it has no list of tables")
    for table in tables:
        _check_table(table)
    return tables


def read_user(path: Path) -> list[dict]:
    """The tables of a user's file; none where there is no file. ValueError for a damaged file, or
    one that others could have written."""
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise ValueError("others than its owner may write it, or its owner is another user")
            return read(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read ({error})") from None


def write(path: Path, tables: list[dict], mode: int = 0o600) -> None:
    """All of it or nothing: a reader sees the file as it was before, or as it is after."""
    text = json.dumps({"schema": SCHEMA, "tables": tables}, indent=1) + "\n"
    read(text)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def check_writable(path: Path) -> None:
    """OSError unless a file can be put there; its folder is made."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder")


def merged(tables: list[dict], new: dict) -> list[dict]:
    """The tables with new in the place of the one of its machine, threads and versions; ops that
    new did not measure stay as they were there."""
    key = ("machine", "threads", "fasttx", "torch")
    same = [t for t in tables if all(t[k] == new[k] for k in key)]
    ops = {op: entries for t in same for op, entries in t["ops"].items()} | new["ops"]
    others = [t for t in tables if t not in same]
    return [*others, new | {"ops": dict(sorted(ops.items()))}]


def _check_table(table) -> None:
    kinds = {"machine": str, "threads": int, "fasttx": str, "torch": str, "ops": dict}
    for key, kind in kinds.items():
        if not isinstance(table, dict) or not isinstance(table.get(key), kind):
            raise ValueError(f"a table needs {key}, {kind.__name__}")
    for op, entries in table["ops"].items():
        if not isinstance(entries, list):
            raise ValueError(f"{op} must have a list of entries")
        for entry in entries:
            if why := _wrong(entry):
                raise ValueError(f"an entry of {op} {why}, got {json.dumps(entry)[:300]}")


def _wrong(entry) -> str | None:
    """What an entry lacks, or None."""
    if not isinstance(entry, dict):
        return "must be an object"
    for key in ("dtypes", "sizes", "given", "layout", "ms"):
        if not isinstance(entry.get(key, {}), dict):
            return f"must have as its {key} an object"
    if not all(dtype in DTYPES for dtype in entry.get("dtypes", {}).values()):
        return f"must have as dtypes {', '.join(DTYPES)}"
    for key, bounds in entry.get("sizes", {}).items():
        if not (_SIZE.fullmatch(key) and _numbers(bounds, 2, int)):
            return 'must have sizes like {"x.0": [low, high]}'
    for allowed in entry.get("given", {}).values():
        if not isinstance(allowed, (bool, list)):
            return "must have as given a bool or the list of the allowed values of each argument"
    if not all(how in LAYOUTS for how in entry.get("layout", {}).values()):
        return f"must have as layouts {', '.join(LAYOUTS)}"
    times, backend = entry.get("ms", {}), entry.get("backend")
    if not _numbers(list(times.values()), len(times), float):
        return "must have as its ms a number for each backend"
    if backend not in BACKENDS or min(times, key=times.get, default=None) != backend:
        return "must name the times measured and as its backend the fastest of them"
    if not _numbers(entry.get("gain"), 3, float) or entry["gain"][1] < LEAST_GAIN:
        return f"must have as its gain [median, low, high] with low at least {LEAST_GAIN}"
    return None


def _numbers(values, count: int, kind: type) -> bool:
    kinds = (int, float) if kind is float else kind
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(v, kinds) and not isinstance(v, bool) and v == v for v in values)
    )
