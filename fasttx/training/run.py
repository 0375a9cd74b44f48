"""`fasttx train`: from a config to a trained model in its folder."""

import hashlib
from pathlib import Path

import torch

from .checkpoint import checkpoints, replaced
from .config import Config, read_config
from .loop import Result, fit
from .models import make_model
from .objectives import CausalLM, Examples, SpanCorruption
from .pairs import Pairs, parted, read_pairs
from .parallel import Group
from .stream import TokenStream
from .text import read_documents
from .tokenizer import Tokenizer, train_tokenizer

__all__ = ["train"]

TEMPLATES = {"causal_lm": "bos", "span_corruption": "eos", "pairs": "eos"}


def train(
    path: str | Path,
    *,
    resume: bool = False,
    output: str | Path | None = None,
    progress: bool = False,
) -> Result:
    """Train what a YAML file says; see fit and docs/training.md.

    resume: go on from the newest checkpoint in the output folder. output: another folder than the
    file's.

    Raises as read_config and fit.
    """
    config = read_config(path, output)
    saves = config.output / "checkpoints"
    if checkpoints(saves) and not resume:
        raise ValueError(
            f"{config.output} holds a run: go on with --resume, or choose another output"
        )
    with Group(config.training.device, config.training.parallel) as group:
        folder = config.tokenizer.folder
        if folder is None:
            folder = config.output / "tokenizer"
            if group.leads and not checkpoints(saves):
                _make_tokenizer(config, folder)
            group.wait()
        return _train(config, Tokenizer.load(folder), resume, progress)


def _train(config: Config, tokenizer: Tokenizer, resume: bool, progress: bool) -> Result:
    examples, held, text = (_examples if config.pairs is None else _pairs)(config, tokenizer)
    torch.manual_seed(config.training.seed)
    model = make_model(config.model, config.task, tokenizer)
    given = {k: v for k, v in config.given.items() if k not in ("output", "training")}
    return fit(
        model,
        examples,
        config.output,
        options=config.training,
        evaluation=held,
        tokenizer=tokenizer,
        resume=resume,
        progress=progress,
        identity={"config": given, "text": text},
    )


def _examples(config: Config, tokenizer: Tokenizer) -> tuple[Examples, Examples | None, str]:
    """Of the objective: to train on and to evaluate on, and the fingerprint of their text."""
    cls, options = config.objective
    if cls is CausalLM and config.model.library == "fasttx":
        options = {"layout": "flat"} | options
    objective = cls(tokenizer, **options)
    stream, held = _streams(config, tokenizer, getattr(objective, "whole_word", False))
    seed = config.training.seed
    evaluation = None if held is None else objective.examples(held, seed + 1)
    arrays = [a for s in (stream, held) if s is not None for a in (s.bounds, s.ids)]
    return objective.examples(stream, seed), evaluation, _fingerprint(arrays)


def _pairs(config: Config, tokenizer: Tokenizer) -> tuple[Pairs, Pairs | None, str]:
    section = config.pairs
    pairs, held = read_pairs(section.files, "pairs.files"), None
    if isinstance(section.evaluation, list):
        held = read_pairs(section.evaluation, "pairs.evaluation")
    elif section.evaluation is not None:
        pairs, held = parted(pairs, section.evaluation, config.training.seed)
    lengths = section.length, section.target_length
    parts = [
        None if part is None else Pairs(tokenizer, part, *lengths, cut=section.cut)
        for part in (pairs, held)
    ]
    arrays = [a for p in parts if p is not None for a in (*p.sources, *p.targets)]
    return *parts, _fingerprint(arrays)


def _make_tokenizer(config: Config, folder: Path) -> None:
    section = config.tokenizer
    template = TEMPLATES.get(config.task, "bos_eos")
    if config.objective is not None and not config.objective[1].get("bos", True):
        template = "none"
    sentinels = 100 if config.task == SpanCorruption.name else 0
    if config.pairs is None:
        texts = read_documents(config.text.files, config.text.documents, "text.files")
    else:
        texts = (text for pair in read_pairs(config.pairs.files, "pairs.files") for text in pair)
    tokenizer = train_tokenizer(
        section.kind,
        texts,
        section.vocab_size,
        lowercase=section.lowercase,
        min_frequency=section.min_frequency,
        sentinels=sentinels if section.sentinels is None else section.sentinels,
        special=section.special,
        template=template,
    )
    config.output.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}")
    with replaced(folder, temporary):
        tokenizer.save(temporary)


def _streams(config: Config, tokenizer, words: bool) -> tuple[TokenStream, TokenStream | None]:
    text = config.text

    def read(files, name):
        documents = read_documents(files, text.documents, name)
        return TokenStream.from_documents(tokenizer, documents, words=words)

    stream = read(text.files, "text.files")
    if text.evaluation is None:
        return stream, None
    if isinstance(text.evaluation, list):
        return stream, read(text.evaluation, "text.evaluation")
    return stream.parted(text.evaluation, config.training.seed)


def _fingerprint(arrays) -> str:
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(array.tobytes())
    return f"sha256:{whole.hexdigest()}"
