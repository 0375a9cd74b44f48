"""`fasttx train`: from a config to a trained model in its folder."""

import hashlib
from pathlib import Path

import torch

from .checkpoint import checkpoints, replaced
from .config import Config, read_config
from .loop import Result, fit
from .models import make_model
from .objectives import CausalLM, SpanCorruption
from .parallel import Group
from .stream import TokenStream
from .text import read_documents
from .tokenizer import Tokenizer, train_tokenizer

__all__ = ["train"]

TEMPLATES = {"causal_lm": "bos", "span_corruption": "eos"}


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
    cls, options = config.objective
    if cls is CausalLM and config.model.library == "fasttx":
        options = {"layout": "flat"} | options
    objective = cls(tokenizer, **options)
    stream, held = _streams(config, tokenizer, getattr(objective, "whole_word", False))
    seed = config.training.seed
    torch.manual_seed(seed)
    model = make_model(config.model, cls, tokenizer)
    given = {k: v for k, v in config.given.items() if k not in ("output", "training")}
    return fit(
        model,
        objective.examples(stream, seed),
        config.output,
        options=config.training,
        evaluation=None if held is None else objective.examples(held, seed + 1),
        tokenizer=tokenizer,
        resume=resume,
        progress=progress,
        identity={"config": given, "text": _fingerprint(stream, held)},
    )


def _make_tokenizer(config: Config, folder: Path) -> None:
    section = config.tokenizer
    name = config.objective[0].name
    template = TEMPLATES.get(name, "bos_eos")
    if not config.objective[1].get("bos", True):
        template = "none"
    sentinels = 100 if config.objective[0] is SpanCorruption else 0
    tokenizer = train_tokenizer(
        section.kind,
        read_documents(config.text.files, config.text.documents, "text.files"),
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


def _fingerprint(*streams: TokenStream | None) -> str:
    whole = hashlib.sha256()
    for stream in streams:
        if stream is not None:
            whole.update(stream.bounds.tobytes())
            whole.update(stream.ids.tobytes())
    return f"sha256:{whole.hexdigest()}"
