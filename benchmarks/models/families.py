"""The six families as transformers runs them, unpatched and under ``fasttx.patch``: random weights
of the base sizes with fewer layers, or any Hugging Face folder.

A folder is loaded with the head its config names.
"""

from __future__ import annotations

import copy
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..contest import Bench as Contest
from ..contest import Case, Contender, Group, timed
from ..gate import Error, Verdict, judge
from ..ops.attention_case import DTYPES
from ..providers import Skip, theirs
from ..rows import Run
from .batches import NEW_TOKENS, answers, call, given_of, make_batch, visible

BASE = "sdpa"
LABELS = {
    "fasttx": "transformers + fasttx.patch",
    "fasttx_unpad": "fasttx.patch(unpad=True)",
    "fasttx_models": "fasttx.models",
    "sdpa": "transformers",
    "torch_compile": "transformers, torch.compile",
}
FOLDER_FLOPS = 70_000_000_000


@dataclass(frozen=True)
class Family:
    """config: over transformers' defaults, which are the base size. batches: (rows, length) by
    direction. goals: must-have ratios by (dtype, direction)."""

    head: str
    config_class: str
    config: dict[str, Any]
    batches: dict[str, tuple[tuple[int, int], ...]]
    kind: str
    goals: dict[tuple[str, str, int], float] = field(default_factory=dict)


_SHORT, _LONG = (8, 128), (2, 512)
_BOTH = {"forward": (_SHORT,), "step": (_SHORT, _LONG)}
FAMILIES = {
    "bert-base": Family(
        "BertForMaskedLM", "BertConfig", {"num_hidden_layers": 4}, _BOTH, "masked",
        {("bf16", "step", 128): 1.8, ("bf16", "step", 512): 2.2},
    ),
    "bert-encoder": Family(
        "BertModel", "BertConfig", {"num_hidden_layers": 4}, {"forward": (_SHORT,)}, "hidden",
        {("fp32", "forward", 128): 1.86, ("bf16", "forward", 128): 1.47},
    ),
    "roberta-base": Family(
        "RobertaForMaskedLM", "RobertaConfig",
        {"num_hidden_layers": 4, "vocab_size": 50265, "max_position_embeddings": 514,
         "type_vocab_size": 1},
        _BOTH, "masked",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config", {"n_layer": 4}, {"forward": (_SHORT,), "step": (_SHORT,)},
        "causal", {("bf16", "step", 128): 1.8, ("fp32", "step", 128): 1.6},
    ),
    "bloom": Family(
        "BloomForCausalLM", "BloomConfig",
        {"n_layer": 4, "hidden_size": 768, "n_head": 12, "vocab_size": 50304},
        {"forward": (_LONG,), "step": (_LONG,)}, "causal",
        {("bf16", "step", 512): 1.6, ("fp32", "step", 512): 1.5},
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"num_layers": 4, "num_decoder_layers": 4, "decoder_start_token_id": 0},
        {"forward": (_LONG,), "step": (_LONG,)}, "seq2seq",
        {("bf16", "step", 512): 2.2, ("fp32", "step", 512): 1.9},
    ),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig",
        {"encoder_layers": 3, "decoder_layers": 3, "d_model": 768, "encoder_ffn_dim": 3072,
         "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12},
        {"forward": (_LONG,), "step": (_LONG,)}, "seq2seq", {("bf16", "step", 512): 1.6},
    ),
}  # fmt: skip


class NotAModel(ValueError):
    """A folder that cannot be benchmarked, and why."""


@dataclass
class Source:
    name: str
    title: str
    kind: str
    make: Callable[[torch.dtype], torch.nn.Module]
    batches: dict[str, tuple[tuple[int, int], ...]]
    goals: dict[tuple[str, str, int], float] = field(default_factory=dict)


def source_of(name: str) -> Source:
    """A family by its name, or a folder. NotAModel says why it is neither."""
    return family(name) if name in FAMILIES else folder(name)


def family(name: str) -> Source:
    transformers = importlib.import_module("transformers")
    f = FAMILIES[name]
    config = getattr(transformers, f.config_class)(**f.config)

    def make(dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        model = getattr(transformers, f.head)._from_config(copy.deepcopy(config))
        return model.to(dtype).eval()

    layers = f.config.get("num_hidden_layers") or f.config.get("n_layer")
    title = f"{name}, {layers} layers" if layers else f"{name}, short"
    return Source(name, title, f.kind, make, f.batches, f.goals)


def folder(path: str) -> Source:
    """Any Hugging Face folder, with the head that its config names."""
    transformers = importlib.import_module("transformers")
    try:
        config = json.loads(Path(path, "config.json").read_text())
        head = getattr(transformers, (config.get("architectures") or ["none"])[0], None)
    except (OSError, ValueError, AttributeError) as error:
        raise NotAModel(f"{path} is no Hugging Face folder: {error}") from None
    if head is None:
        raise NotAModel(f"{path}: its config names no architecture that transformers has")
    name = head.__name__
    kind = (
        "masked" if name.endswith("MaskedLM")
        else "seq2seq" if name.endswith("ConditionalGeneration")
        else "causal" if name.endswith(("CausalLM", "LMHeadModel"))
        else "hidden"
    )  # fmt: skip

    def make(dtype: torch.dtype) -> torch.nn.Module:
        return head.from_pretrained(path, dtype=dtype, local_files_only=True).eval()

    size, room = _fitting(head, path)
    batches = {"forward": (size,), "step": (size,)}
    if kind in ("causal", "seq2seq") and room > NEW_TOKENS:
        batches["generate"] = ((1, min(64, room - NEW_TOKENS)),)
    return Source(Path(path).name, f"{Path(path).name} ({name})", kind, make, batches)


def quiet() -> None:
    """transformers' progress bars and advice would stand between the rows."""
    logging = importlib.import_module("transformers").utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check(path: str) -> None:
    """NotAModel says why a folder cannot be measured: it is loaded, and asked once."""
    quiet()
    try:
        source = folder(path)
        model = source.make(torch.float32)
        size = 1, source.batches["forward"][0][1]
        batch = make_batch(model.config, source.kind, size, next(model.parameters()).device)
        answers(model, batch, "forward")
    except (ImportError, NotAModel):
        raise
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotAModel(f"{path} cannot be measured: {why}") from error


def _fitting(head, path: str) -> tuple[tuple[int, int], int]:
    """(rows, length) whose forward is about that of 256 tokens of a base-size model: a folder is
    measured in two minutes. And the positions that the model has."""
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    text = config.get_text_config()
    if getattr(text, "vocab_size", None) is None:
        raise NotAModel(f"{path} cannot be measured: {head.__name__} takes no token ids")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in head(config).parameters())
    # RoBERTa's and BART's first positions are not for tokens.
    room = (getattr(text, "max_position_embeddings", None) or 1 << 20) - 2
    length = max(1, min(_SHORT[1], room))
    rows = max(1, min(_SHORT[0], FOLDER_FLOPS // (2 * parameters * length)))
    return (rows, length), room


def cases(name: str, options) -> Iterator[Case]:
    source, threads = source_of(name), options.threads[0]
    for dtype in options.dtypes:
        for direction, sizes in source.batches.items():
            for size in sizes if options.wants(direction) else ():
                yield Case(
                    f"{source.title} {dtype} {direction} {size[0]} x {size[1]}",
                    {"source": name, "dtype": dtype}, {"direction": direction, "size": size},
                    threads, memory=name not in FAMILIES and direction == "step",
                )  # fmt: skip


class Bench(Contest):
    """One model in one dtype, of a source or its name: unpatched, patched, in fp64; for generation
    also in fasttx.models, where that knows the family; and what of the providers `beside` it can
    run."""

    def __init__(
        self,
        source: Source | str,
        dtype: str,
        device: torch.device,
        run: Run,
        beside: Mapping[str, Any] | None = None,
    ):
        beside = beside or {}
        self.peers = {n: p for n, p in beside.items() if hasattr(p, "model_forward")}
        self.source = source = source_of(source) if isinstance(source, str) else source
        self.dtype, self.device, self.run = dtype, device, run
        torch_dtype = DTYPES[dtype]
        self.models = {"sdpa": source.make(torch_dtype).to(device)}
        # The same rounded weights, so that only the arithmetic differs.
        self.exact = copy.deepcopy(self.models["sdpa"]).double()
        patched = copy.deepcopy(self.models["sdpa"])
        why = patch(patched)
        if why is None:
            self.models = {"fasttx": patched, **self._unpadded(), **self.models}
        else:
            run.skip(f"fasttx.patch on {source.name}", why)
        if "generate" in source.batches:
            try:
                self.models["fasttx_models"] = as_fasttx(self.models["sdpa"])
            except ValueError as error:
                run.skip(f"fasttx.models for {source.name}", str(error))
        if "torch_compile" in beside:
            self.models["torch_compile"] = compiled(copy.deepcopy(self.models["sdpa"]))
        self._judged: dict[tuple, tuple] = {}

    def _unpadded(self) -> dict[str, torch.nn.Module]:
        """Patched to leave padding out, where the model has an encoder that can."""
        model = copy.deepcopy(self.models["sdpa"])
        try:
            patch(model, unpad=True)
        except (TypeError, ValueError):
            return {}
        return {"fasttx_unpad": model}

    def contest(
        self, threads: int, direction: str, size: tuple[int, int]
    ) -> tuple[Group, dict[str, Contender]]:
        batch = make_batch(self.exact.config, self.source.kind, size, self.device)
        verdicts, prepared, flops = self._judge(direction, size, batch)
        contenders = {
            name: Contender(
                LABELS[name], call(self.models[name], batch, direction), verdicts[name],
                prepared[name] if name == "torch_compile" else None,
            )
            for name in self._names(direction)
        }  # fmt: skip
        if direction == "forward":
            contenders |= self._peers(batch, verdicts["sdpa"], threads)
        generating = direction == "generate"
        group = Group(
            "model", self.source.name, f"{self.source.title}, {size[0]} x {size[1]}", direction,
            self.dtype, BASE, {"batch": size[0], "queries": size[1]}, {"kind": self.source.kind},
            flops=flops, tokens=NEW_TOKENS if generating else int(batch["attention_mask"].sum()),
            notes=["timed with the model's own dropout, checked without it"]
            if direction == "step" else [],
        )  # fmt: skip
        return group, contenders

    def _names(self, direction: str) -> list[str]:
        generating = direction == "generate"
        unfit = ("torch_compile", "fasttx_unpad") if generating else ("fasttx_models",)
        return [name for name in self.models if name not in unfit]

    def _peers(self, batch, plain: Verdict, threads: int) -> dict[str, Contender]:
        """The forward of other runtimes, and what it is worth."""
        given, found = given_of(self.models["sdpa"], batch), {}
        exact = answers(self.exact, batch, "forward")["out"]
        for name, peer in self.peers.items():
            try:
                start = time.perf_counter()
                with theirs():
                    run = peer.model_forward(self.models["sdpa"], given, threads)
                    error = Error.between(visible(run(), batch), exact)
            except Skip as why:
                self.run.skip(f"{peer.LABEL}: {self.source.name} {self.dtype}", str(why))
                continue
            seconds = time.perf_counter() - start
            verdict = judge({"out": error}, plain.errors, DTYPES[self.dtype])
            notes = list(getattr(peer, "NOTES", ()))
            found[name] = Contender(peer.LABEL, run, verdict, seconds, notes)
        return found

    def _judge(self, direction: str, size, batch) -> tuple[dict, dict, int | None]:
        """Verdicts, wall seconds of the checked answer and FLOPs, the last as the unpatched model
        needs them."""
        key = direction, size
        if key not in self._judged:
            found, seconds, flops = {}, {}, None
            for name in self._names(direction):
                counter = FlopCounterMode(display=False) if name == "sdpa" else nullcontext()
                with counter:
                    work = partial(answers, self.models[name], batch, direction)
                    found[name], seconds[name] = timed(work)
                if name == "sdpa" and direction != "generate":
                    flops = counter.get_total_flops()
            self._judged[key] = self._verdicts(direction, batch, found), seconds, flops
        return self._judged[key]

    def _verdicts(self, direction: str, batch, found: dict) -> dict[str, Verdict]:
        if direction == "generate":
            return {name: _same_ids(ids, found["sdpa"]) for name, ids in found.items()}
        exact = answers(self.exact, batch, direction)
        errors = {
            n: {k: Error.between(t, exact[k]) for k, t in values.items()}
            for n, values in found.items()
        }
        dtype, plain = DTYPES[self.dtype], errors["sdpa"]
        verdicts = {n: judge(errors[n], plain, dtype) for n in found}
        if not all(verdict.ok for verdict in verdicts.values()):
            plain = self._worse(direction, batch, exact, plain)
            verdicts = {n: judge(errors[n], plain, dtype) for n in found}
        return verdicts

    def _worse(self, direction: str, batch, exact: dict, plain: dict) -> dict[str, Error]:
        """The yardstick of a largest error, which chance decides: the worse one of plain PyTorch's
        two ways, SDPA and the formula written out."""
        model = self.models["sdpa"]
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation("eager")
        except (AttributeError, ValueError):
            return plain
        try:
            found = answers(model, batch, direction)
        finally:
            model.set_attn_implementation(before)
        other = {k: Error.between(t, exact[k]) for k, t in found.items()}
        return {k: replace(e, largest=max(e.largest, other[k].largest)) for k, e in plain.items()}


def fresh(
    source: str, dtype: str, direction: str, size: tuple[int, int], provider: str,
    device: torch.device,
) -> Callable:  # fmt: skip
    """For a fresh process (fresh.py): one model; the smaller batch has one row of 16."""
    found = source_of(source)
    model = found.make(DTYPES[dtype]).to(device)

    def prepare():
        ready = made_ready(model, provider)
        return [
            call(ready, make_batch(model.config, found.kind, s, device), direction)
            for s in (tuple(size), (1, 16))
        ]

    return prepare


def made_ready(model: torch.nn.Module, provider: str):
    """The model as a provider runs it; ValueError where fasttx cannot."""
    if provider == "fasttx_models":
        return as_fasttx(model)
    if provider.startswith("fasttx") and (why := patch(model, provider == "fasttx_unpad")):
        raise ValueError(why)
    return compiled(model) if provider == "torch_compile" else model


def compiled(model: torch.nn.Module):
    """By torch.compile, for each shape anew. What was compiled before is forgotten: past a number
    of versions of one function the next ones would run uncompiled, and say nothing."""
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


def as_fasttx(model: torch.nn.Module):
    """The same weights in fasttx.models; ValueError where it does not know the family."""
    models = importlib.import_module("fasttx").models
    with tempfile.TemporaryDirectory() as home:
        model.save_pretrained(home)
        try:
            ours = models.from_pretrained(home)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{home}/", "")) from None
    return ours.to(next(model.parameters()).device)


def patch(model: torch.nn.Module, unpad: bool = False) -> str | None:
    """Patches what can be; why nothing could."""
    told = {"unpad": True} if unpad else {}  # --base: an older patch does not know the word
    report = importlib.import_module("fasttx").patch(model, **told)
    return None if report.replaced else str(report)


def _same_ids(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Verdict:
    """Greedy ids that part may do so by a near tie: then nothing is said about them."""
    same = ours["ids"] == theirs["ids"]
    if same.all():
        return Verdict(True)
    return Verdict(None, why=f"{int(same.sum())} of {same.numel()} ids are the unpatched model's")
