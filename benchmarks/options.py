"""What was asked for, checked before anything runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import ops, providers
from .models.families import FAMILIES, NotAModel, check
from .models.generate import MODELS as GENERATED
from .models.layers import LAYERS
from .models.train import NAMES as TRAINED
from .ops.attention_case import DIRECTIONS, DTYPES

MODELS = ("bert", *FAMILIES)
KINDS = {
    "op": ops.names(),
    "model": MODELS,
    "layer": tuple(LAYERS),
    "train": TRAINED,
    "generate": tuple(GENERATED),
}
# What an option of this kind is called in Options.
FIELDS = {
    "op": "ops",
    "model": "models",
    "layer": "layers",
    "train": "training",
    "generate": "generation",
}
MAIN_JOB = {"ops": ("attention",), "models": ("bert",)}
SUITES = ("quick", "full", "musts")
STAGES = ("ratios", "forced", "costs", "errors", "memory")
BACKENDS = ("cpu", "triton", "reference", "torch")
MAX_SIZE = 1 << 17


class UsageError(ValueError):
    """One clear line for the user; the command ends with exit code 2."""


@dataclass
class Options:
    """See ``fasttx bench --help``. ``sizes`` empty means the suite's own cases."""

    ops: tuple[str, ...] = ("attention",)
    models: tuple[str, ...] = ("bert",)
    layers: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    suite: str = "quick"
    sizes: tuple[int, ...] = ()
    batch: int = 1
    heads: int = 12
    head_dim: int = 64
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    directions: tuple[str, ...] = ("forward", "backward")
    default_directions: bool = True
    providers: tuple[str, ...] = ()
    backend: str | None = None
    threads: tuple[int, ...] = (1,)
    default_threads: bool = True
    device: str = "cpu"
    budget_s: float | None = None
    memory: bool = False
    cold: bool = False
    stages: tuple[str, ...] = ()
    csv: Path | None = None
    json: Path | None = None
    out: Path | None = None
    command: str = "fasttx bench"
    notes: list[str] = field(default_factory=list)

    @property
    def model_threads(self) -> tuple[int, ...]:
        """The thread counts asked for; if none were, also all cores, as a user would run it."""
        more = (len(os.sched_getaffinity(0)),) if self.default_threads else ()
        return tuple(dict.fromkeys((*self.threads, *more)))

    def wants(self, direction: str) -> bool:
        return self.default_directions or direction in self.directions

    def only_a_folder(self) -> bool:
        """A user's own model and nothing else: under two minutes."""
        others = self.ops or self.layers or self.training or self.generation
        return not others and len(self.models) == 1 and Path(self.models[0]).is_dir()


def split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def choose(what: str, given: str | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """A comma-separated choice among names."""
    for name in split(given):
        if name not in allowed:
            raise UsageError(f"unknown {what} {name!r}: choose from {', '.join(allowed)}")
    return tuple(dict.fromkeys(split(given)))


def targets(words: list[str]) -> dict[str, tuple[str, ...]]:
    """Names by field of Options, of ``op attention model bert layer gpt2`` or just ``attention``.

    A bare kind means all of it; no word at all means the main job. A folder is a Hugging Face
    model. A name that several kinds have is that of the first, unless its kind stands before it.
    """
    if not words:
        return dict.fromkeys(FIELDS.values(), ()) | MAIN_JOB
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    kind = None
    for i, word in enumerate(words):
        if word in KINDS:
            kind = word
            if i + 1 == len(words) or words[i + 1] in KINDS:
                found[kind] = list(KINDS[kind])
            continue
        if kind in (None, "model") and (os.sep in word or Path(word).is_dir()):
            if not word or not Path(word).is_dir():
                raise UsageError(f"model folder {word!r}: there is no such folder")
            if not Path(word, "config.json").is_file():
                raise UsageError(f"model folder {word!r} has no config.json")
            found["model"].append(word)
            continue
        home = next((k for k, names in KINDS.items() if word in names and kind in (None, k)), None)
        if home is None:
            raise UsageError(f"unknown {kind or 'op or model'} {word!r}: {_known(kind)}")
        found[home].append(word)
    return {FIELDS[kind]: tuple(dict.fromkeys(names)) for kind, names in found.items()}


def check_folders(models: tuple[str, ...]) -> None:
    """Loads a user's own models and asks them once: then what follows will run."""
    for name in models:
        if name in MODELS:
            continue
        try:
            check(name)
        except NotAModel as why:
            raise UsageError(f"model folder {why}") from None
        except ImportError as why:
            raise UsageError(f"model folder {name}: {why}") from None


def place(what: str, given: Path | None, folder: bool = False) -> Path | None:
    """A path that can be written to: of a file, or of a folder."""
    if given is not None and given.exists() and given.is_dir() != folder:
        raise UsageError(f"{what} {str(given)!r} is a {'file' if folder else 'folder'}")
    return given


def _known(kind: str | None) -> str:
    kinds = [kind] if kind else list(KINDS)
    return "; ".join(f"{k}: {', '.join(KINDS[k])}" for k in kinds)


def sizes(what: str, given: str | None, most: int = MAX_SIZE, of: str = "") -> tuple[int, ...]:
    """Positive sizes, comma-separated, each at most `most`; of: what those are."""
    found = []
    for part in split(given):
        try:
            size = int(part)
        except ValueError:
            size = 0
        if not 1 <= size <= most:
            raise UsageError(f"{what} must be whole numbers from 1 to {most}{of}, got {part!r}")
        found.append(size)
    return tuple(dict.fromkeys(found))


def thread_counts(given: str | None) -> tuple[int, ...]:
    cores = len(os.sched_getaffinity(0))
    return sizes("--threads", given, cores, ", the cores usable here") or (1,)


def device(given: str | None) -> str:
    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if given not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {given!r}: choose from cpu, cuda")
    if given == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here")
    return given


def provider_names(given: str | None) -> tuple[str, ...]:
    known = tuple(providers.find())
    chosen = choose("provider", given, known)
    for name in chosen:
        why = providers.find()[name].reason()
        if why is not None:
            raise UsageError(f"provider {name!r} cannot be used here: {why}")
    return chosen


def dtypes(given: str | None) -> tuple[str, ...]:
    return choose("dtype", given, tuple(DTYPES)) or ("fp32", "bf16")


def directions(given: str | None) -> tuple[str, ...]:
    return choose("direction", given, DIRECTIONS) or ("forward", "backward")


def suite(named: str | None, **flags: bool) -> str:
    """The suite by name or by flag; two different ones at once are a mistake."""
    given = {name for name, flag in flags.items() if flag} | set(choose("suite", named, SUITES))
    if len(given) > 1:
        raise UsageError(f"choose one suite, got {' and '.join(sorted(given))}")
    return next(iter(given), "quick")


def one_size(what: str, value: int, most: int = MAX_SIZE) -> int:
    if not 1 <= value <= most:
        raise UsageError(f"{what} must be a whole number from 1 to {most}, got {value}")
    return value


def seconds(what: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < 86400:
        raise UsageError(f"{what} must be more than 0 seconds and less than a day, got {value}")
    return value
