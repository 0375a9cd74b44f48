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
    seed: of the order of rows, the noise and the generators. device: "auto" is a GPU if there is
    one; or "cpu", "cuda", "cuda:1". parallel, under torchrun: "ddp" or "fsdp".
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
        if self.patience is not None and not self.evaluate_every:
            wrong.append("patience needs evaluate_every")
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


def read_section(
    cls: type, given, where: str, problems: list[str], *, leave: tuple[str, ...] = (), check=None
) -> dict | None:
    """The values for cls(**values), or None with what is wrong added to `problems`, each with the
    path of its key.

    leave: fields that are not the section's to set. check: values to what else is wrong.
    """
    given = {} if given is None else given
    if not isinstance(given, dict):
        problems.append(f"{where} must be a mapping, got {given!r}")
        return None
    fields = [f for f in dataclasses.fields(cls) if f.name not in leave]
    known = [f.name for f in fields]
    found = unknown_keys(given, known, where)
    values = {k: _plain(cls, k, v) for k, v in given.items() if k in known}
    needed = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    found += [f"{where}.{name} is missing" for name in needed if name not in values]
    wrong = type_problems(cls, values)
    if not wrong and not any("is missing" in text for text in found) and check is not None:
        wrong = check(values)
    problems += found + [f"{where}.{text}" for text in wrong]
    return None if found or wrong else values


def option_problems(values: dict) -> list[str]:
    """What is wrong with values for TrainOptions."""
    try:
        TrainOptions(**values)
    except ConfigError as error:
        return error.problems
    return []


def unknown_keys(given: dict, known: list[str], where: str) -> list[str]:
    wrong = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            wrong.append(f"{where}.{key} is unknown{hint}")
    return wrong


def _plain(cls: type, key: str, value):
    """YAML reads 1e-3 as a text, and a pair as a list."""
    hint = typing.get_type_hints(cls)[key]
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and _accepts(hint, 0.5) and not _accepts(hint, value):
        try:
            return float(value)
        except ValueError:
            pass
    return value


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
