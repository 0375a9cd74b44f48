"""CONFIG.yaml of `fasttx train`, read and checked whole before anything is made."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .models import model_problems
from .objectives import OBJECTIVES
from .options import ConfigError, TrainOptions, option_problems, read_section, unknown_keys
from .text import SPLITS, check_files
from .tokenizer import KINDS

__all__ = ["Config", "read_config"]

SECTIONS = ("output", "text", "pairs", "tokenizer", "objective", "model", "training")


@dataclass(frozen=True)
class Text:
    """files: one or several, * allowed. documents: "line", "paragraph" or "file". evaluation: files
    to evaluate on, or a share of the documents, which is then not trained on."""

    files: str | list
    documents: Literal["line", "paragraph", "file"] = SPLITS[0]
    evaluation: str | list | float | None = None


@dataclass(frozen=True)
class PairsSection:
    """files, evaluation: as Text's, of lines "source<TAB>target"; length, target_length, cut: of
    Pairs. In the place of text and objective."""

    files: str | list
    evaluation: str | list | float | None = None
    length: int = 128
    target_length: int = 128
    cut: bool = False


@dataclass(frozen=True)
class TokenizerSection:
    """folder: of a tokenizer that exists; else the rest, which is train_tokenizer's."""

    folder: str | None = None
    kind: Literal["bpe", "wordpiece", "unigram", "word", "char"] = KINDS[0]
    vocab_size: int = 8000
    lowercase: bool = False
    min_frequency: int = 2
    sentinels: int | None = None
    special: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSection:
    """folder: of a model to go on from; or family (bert, roberta, gpt2, bloom, t5, bart, ...) and
    sizes in the words of transformers' config. library: "fasttx", or "transformers" with
    fasttx.patch unless `patch` is false. Every other key is of the model's config."""

    folder: str | None = None
    family: str | None = None
    library: Literal["fasttx", "transformers"] = "fasttx"
    patch: bool = True
    sizes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """output: the run's folder; the sections, paths absolute; given: the file's content. Either
    text and objective, or pairs."""

    output: Path
    text: Text | None
    pairs: PairsSection | None
    tokenizer: TokenizerSection
    objective: tuple[type, dict] | None
    model: ModelSection
    training: TrainOptions
    given: dict

    @property
    def task(self) -> str:
        """The objective's name, or "pairs"."""
        return "pairs" if self.objective is None else self.objective[0].name


def read_config(path: str | Path, output: str | Path | None = None) -> Config:
    """The config of a YAML file. Paths in it are relative to its folder; output: instead of its.

    Raises:
        ConfigError: every unknown key, wrong type, impossible value and missing file, each named.
    """
    import yaml

    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([" ".join(str(error).split())], f"{path} is not YAML") from None
    if not isinstance(given, dict):
        raise ConfigError([f"must be a mapping of {', '.join(SECTIONS)}"], str(path))
    wrong = [w.removeprefix("config.") for w in unknown_keys(given, list(SECTIONS), "config")]
    paired = "pairs" in given
    for name in ("model",) if paired else ("text", "objective", "model"):
        if name not in given:
            wrong.append(f"{name} is missing")
    if paired and (both := [name for name in ("text", "objective") if name in given]):
        wrong.append(f"pairs cannot be given with {' and '.join(both)}")
    here = path.parent.resolve()
    folder = output if output is not None else given.get("output")
    if not isinstance(folder, (str, Path)):
        wrong.append("output is missing" if folder is None else f"output must be a text: {folder}")
    elif output is None:
        folder = here / folder
    text = _files(Text, given["text"], "text", here, wrong) if "text" in given else None
    pairs = None
    if paired:
        pairs = _files(PairsSection, given["pairs"], "pairs", here, wrong, check=_lengths)
    objective = _objective(given.get("objective"), wrong) if "objective" in given else None
    model = _model(given.get("model"), here, wrong) if "model" in given else None
    tokenizer = _tokenizer(given.get("tokenizer"), model, here, wrong)
    training = read_section(
        TrainOptions, given.get("training"), "training", wrong, check=option_problems
    )
    if model is not None and model.folder is None:
        if pairs is not None:
            lengths = {f"pairs.{n}": getattr(pairs, n) for n in ("length", "target_length")}
            wrong += model_problems(model, "pairs", lengths, tokenizer)
        elif objective is not None:
            cls, values = objective
            length = values.get("length", cls.__dataclass_fields__["length"].default)
            packed = cls.name == "causal_lm" and values.get("packed", True)
            lengths = {"objective.length": length}
            wrong += model_problems(model, cls.name, lengths, tokenizer, packed=packed)
    if wrong:
        raise ConfigError(wrong, str(path))
    return Config(
        Path(folder).resolve(), text, pairs, tokenizer, objective, model, TrainOptions(**training),
        given,
    )  # fmt: skip


def _files(cls: type, given, where: str, here: Path, wrong: list[str], check=None):
    values = read_section(cls, given, where, wrong, check=check)
    if values is None:
        return None
    for name in ("files", "evaluation"):
        value = values.get(name)
        if isinstance(value, (str, list)):
            values[name] = _found(value, here)
            try:
                check_files(values[name], f"{where}.{name}")
            except ValueError as error:
                wrong.append(str(error))
        elif value is not None and not 0 < value < 1:
            wrong.append(
                f"{where}.evaluation must be files or a share between 0 and 1, got {value}"
            )
    return cls(**values)


def _lengths(values: dict) -> list[str]:
    given = {name: values.get(name, 2) for name in ("length", "target_length")}
    return [f"{name} must be at least 2, got {n}" for name, n in given.items() if n < 2]


def _found(patterns, here: Path) -> list[Path]:
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else map(str, patterns):
        path = Path(here, pattern)
        relative = path.relative_to(path.anchor)
        many = sorted(Path(path.anchor).glob(str(relative))) if "*" in pattern else []
        found += many or [path]
    return found


def _objective(given, wrong: list[str]) -> tuple[type, dict] | None:
    if not isinstance(given, dict) or given.get("name") not in OBJECTIVES:
        name = given.get("name") if isinstance(given, dict) else given
        wrong.append(f"objective.name must be one of {', '.join(OBJECTIVES)}, got {name!r}")
        return None
    cls = OBJECTIVES[given["name"]]
    rest = {k: v for k, v in given.items() if k != "name"}
    values = read_section(cls, rest, "objective", wrong, leave=("tokenizer",), check=cls.problems)
    return None if values is None else (cls, values)


def _model(given, here: Path, wrong: list[str]) -> ModelSection | None:
    own = {f.name for f in dataclasses.fields(ModelSection)} - {"sizes"}
    if not isinstance(given, dict):
        wrong.append(f"model must be a mapping, got {given!r}")
        return None
    sizes = {k: v for k, v in given.items() if k not in own}
    values = read_section(
        ModelSection, {k: v for k, v in given.items() if k in own}, "model", wrong
    )
    if values is None:
        return None
    folder = values.get("folder")
    if (folder is None) == (values.get("family") is None):
        wrong.append("model.folder or model.family must be given, one of them")
        return None
    if folder is not None:
        if sizes:
            wrong.append(f"model: {', '.join(sizes)} cannot be given with model.folder")
        values["folder"] = str(here / folder)
        if not (here / folder / "config.json").is_file():
            wrong.append(f"model.folder: {here / folder} holds no config.json")
    return ModelSection(**values, sizes=sizes)


def _tokenizer(given, model, here: Path, wrong: list[str]) -> TokenizerSection | None:
    values = read_section(TokenizerSection, given, "tokenizer", wrong)
    if values is None:
        return None
    if model is not None and model.folder is not None:
        if set(values) - {"folder"}:
            wrong.append(
                "tokenizer: a model.folder is trained with its own; only folder is allowed"
            )
        values.setdefault("folder", model.folder)
    elif "folder" in values and len(values) > 1:
        wrong.append("tokenizer.folder cannot be given with what a new tokenizer is made of")
    if "folder" in values:
        values["folder"] = str(here / values["folder"])
        if not Path(values["folder"]).is_dir():
            wrong.append(f"tokenizer.folder: {values['folder']} is not a folder")
    return TokenizerSection(**values)
