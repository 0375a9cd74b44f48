"""What `fit` may be told, and mappings read into dataclasses with every wrong key named at once."""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from typing import Literal

__all__ = ["ConfigError", "TrainOptions", "read_section"]


class ConfigError(ValueError):
    """A config that cannot be trained from; the message has a line for each thing wrong."""

    def __init__(self, problems: list[str], where: str = "config"):
        self.problems = problems
        count = "" if len(problems) == 1 else f" ({len(problems)} problems)"
        super().__init__(f"{where}{count}:" + "".join(f"\n  {p}" for p in problems))


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    steps or epochs: how long, one of them. batch_size: rows a step, over all processes;
    micro_batch_size: rows a forward pass on one process; the gradients of a step are those of its
    batch whatever this is. learning_rate is reached after `warmup` steps (a share of all steps
    where below 1) and falls to final_learning_rate by schedule ("constant" stays). weight_decay:
    of matrices; betas, eps: of AdamW. clip: the largest norm of the gradients, None for any.
    precision: "fp32", or "bf16" by autocast. gradient_checkpointing: layers are computed again in
    the backward. evaluate_every, save_every, log_every: in steps; 0 only at the end.
    evaluation_batches: at most so many; None for all. patience: stop after so many evaluations
    without a loss below the best, and keep the best model; None never. keep: checkpoints.
    parallel, under torchrun: "ddp" or "fsdp".
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    evaluate_every: int = 0
    evaluation_batches: int | None = None
    patience: int | None = None
    save_every: int = 0
    keep: int = 2
    log_every: int = 10
    seed: int = 0
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self):
        if problems := self.problems():
            raise ConfigError(problems, "TrainOptions")

    def problems(self) -> list[str]:
        wrong = type_problems(type(self), vars(self))
        if wrong:
            return wrong
        if (self.steps is None) == (self.epochs is None):
            wrong.append(
                f"steps or epochs must be given, one of them; got steps={self.steps}, "
                f"epochs={self.epochs}"
            )
        for name, low, high in (
            ("steps", 1, 1 << 40), ("epochs", 1e-9, 1e9), ("batch_size", 1, 1 << 24),
            ("micro_batch_size", 1, 1 << 24), ("learning_rate", 0, 1e3), ("keep", 1, 1 << 20),
            ("final_learning_rate", 0, 1e3), ("warmup", 0, 1 << 40), ("weight_decay", 0, 1e3),
            ("eps", 0, 1), ("evaluate_every", 0, 1 << 40), ("evaluation_batches", 1, 1 << 40),
            ("patience", 1, 1 << 20), ("save_every", 0, 1 << 40), ("log_every", 1, 1 << 40),
            ("seed", 0, (1 << 63) - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                wrong.append(f"{name} must be between {low} and {high}, got {value}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            wrong.append(f"clip must be above 0, or null for none, got {self.clip}")
        if not all(0 <= b < 1 for b in self.betas):
            wrong.append(f"betas must be in [0, 1), got {list(self.betas)}")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            wrong.append(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            wrong.append(f"device must be auto, cpu or cuda, got {self.device!r}")
        return wrong


def read_section(cls: type, given, where: str, problems: list[str], leave: tuple[str, ...] = ()):
    """cls(**given), or None with what is wrong added to `problems`, each with its key's path.

    leave: fields that are not the section's to set.
    """
    if given is None:
        given = {}
    if not isinstance(given, dict):
        problems.append(f"{where} must be a mapping, got {given!r}")
        return None
    known = [f.name for f in dataclasses.fields(cls) if f.name not in leave]
    found = unknown_keys(given, known, where)
    right = {k: v for k, v in given.items() if k in known}
    if "betas" in right and isinstance(right["betas"], list):
        right["betas"] = tuple(right["betas"])
    right |= {k: float(v) for k, v in right.items() if _is_number_text(cls, k, v)}
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name in known
        and f.name not in right
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    found += [f"{where}.{name} is missing" for name in missing]
    wrong = type_problems(cls, right)
    if not wrong and not missing and hasattr(cls, "problems"):
        try:
            result = cls(**right)
        except ConfigError as error:
            wrong = error.problems
    problems += found + [f"{where}.{text}" for text in wrong]
    if found or wrong:
        return None
    return result if hasattr(cls, "problems") else cls(**right)


def unknown_keys(given: dict, known: list[str], where: str) -> list[str]:
    wrong = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            wrong.append(f"{where}.{key} is unknown{hint}")
    return wrong


def _is_number_text(cls: type, key: str, value) -> bool:
    """YAML reads 1e-3 as a text."""
    if not isinstance(value, str) or not _accepts(typing.get_type_hints(cls).get(key), 0.5):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def type_problems(cls: type, values: dict) -> list[str]:
    """What has another type than its field's annotation."""
    hints = typing.get_type_hints(cls)
    return [
        f"{name} must be {_words(hints[name])}, got {value!r}"
        for name, value in values.items()
        if name in hints and not _accepts(hints[name], value)
    ]


def _accepts(hint, value) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_accepts(h, value) for h in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        fits = isinstance(value, tuple) and len(value) == len(inner)
        return fits and all(_accepts(h, v) for h, v in zip(inner, value, strict=True))
    if origin in (list, dict):
        return isinstance(value, origin)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return type(value) is int
    return hint is None or isinstance(value, hint) if isinstance(hint, type) else value is hint


def _words(hint) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_words(h) for h in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple:
        return f"{len(inner)} numbers"
    if origin is list:
        return "a list"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false",
             dict: "a mapping", type(None): "null"}  # fmt: skip
    return names.get(hint, str(hint))
