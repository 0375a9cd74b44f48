"""BERT as transformers runs it, unpatched and under ``fasttx.patch``, on real padded sentences."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..contest import Bench as Contest
from ..contest import Case, Contender, Group
from ..gate import Error, Verdict, judge
from ..ops.attention_case import DTYPES
from ..rows import Run
from .families import quiet
from .sentences import SENTENCES, paragraphs

NAME = "bert"
BASE = "sdpa"
LABELS = {
    "fasttx": "transformers + fasttx.patch",
    "fasttx_unpad": "fasttx.patch(unpad=True)",
    "sdpa": "transformers, SDPA",
    "eager": "transformers, eager",
}
RANDOM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
RANDOM_BATCHES = {"16 x 52 ids": (16, 52), "4 x 256 ids": (4, 256)}


@dataclass
class Source:
    """Where a model comes from: ``make(dtype, attention)`` builds one more copy of it."""

    title: str
    make: Callable[[torch.dtype, str], torch.nn.Module]
    batches: dict[str, dict[str, Tensor]]
    notes: list[str] = field(default_factory=list)


def load(device: torch.device) -> Source:
    """all-MiniLM-L6-v2 and its tokenizer; where it cannot be had, a random BERT that says so."""
    weights = importlib.import_module("..weights", __name__)
    quiet()
    try:
        _, tokenizer = weights.minilm()
    except weights.Unavailable as error:
        return _random(device, str(error))
    texts = {"16 sentences": list(SENTENCES), "4 paragraphs": paragraphs(4)}
    batches = {
        name: dict(tokenizer(text, padding=True, truncation=True, return_tensors="pt").to(device))
        for name, text in texts.items()
    }

    def make(dtype: torch.dtype, attention: str) -> torch.nn.Module:
        model, _ = weights.minilm(dtype=dtype, attn_implementation=attention)
        return model.to(device)

    return Source("all-MiniLM-L6-v2", make, batches)


_loaded = cache(load)


def _random(device: torch.device, why: str) -> Source:
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(**RANDOM)

    def make(dtype: torch.dtype, attention: str) -> torch.nn.Module:
        torch.manual_seed(0)
        own = copy.deepcopy(config)
        model = transformers.BertModel._from_config(own, attn_implementation=attention)
        return model.to(device, dtype).eval()

    batches = {}
    generator = torch.Generator().manual_seed(0)
    for name, (rows, length) in RANDOM_BATCHES.items():
        ids = torch.randint(1, config.vocab_size, (rows, length), generator=generator)
        lengths = torch.linspace(length // 8, length, rows).long()
        mask = (torch.arange(length) < lengths[:, None]).long()
        batches[name] = {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}
    return Source("random BERT", make, batches, [f"random weights and token ids, because {why}"])


def cases(name: str, options) -> Iterator[Case]:
    importlib.import_module("transformers")
    first = options.threads
    jobs = [(batch, "forward", threads) for batch in (1, 0) for threads in first]
    jobs += [(1, "step", first[0])]
    jobs += [(0, "forward", threads) for threads in options.model_threads if threads not in first]
    for dtype in options.dtypes:
        for batch, direction, threads in jobs:
            if options.wants(direction):
                text = ("sentences", "paragraphs")[batch]
                yield Case(
                    f"BERT on {text} {dtype} {direction}, {threads} thr.",
                    {"dtype": dtype}, {"batch": batch, "direction": direction}, threads,
                )  # fmt: skip


class Bench(Contest):
    """One model in one dtype: an unpatched copy each attention has, one patched, one in fp64."""

    def __init__(
        self, dtype: str, device: torch.device, run: Run,
        beside: Mapping[str, Any] | None = None, source: Source | None = None,
    ):  # fmt: skip
        self.source = source = source or _loaded(device)
        self.dtype, self.device, self.run = dtype, device, run
        torch_dtype = DTYPES[dtype]
        self._verdicts: dict[tuple[str, bool], dict[str, Verdict]] = {}
        self.exact = source.make(torch.float64, "sdpa")
        self.models = {
            "sdpa": source.make(torch_dtype, "sdpa"),
            "eager": source.make(torch_dtype, "eager"),
        }
        for unpad in (True, False):
            patched = source.make(torch_dtype, "sdpa")
            why = _patch(patched, unpad)
            if why is None:
                self.models = {"fasttx_unpad" if unpad else "fasttx": patched, **self.models}
        if why is not None:
            run.skip("fasttx.patch on BERT", why)
        for name, model in self.models.items():
            runs = model.config._attn_implementation
            if not name.startswith(runs):
                raise RuntimeError(f"the {name} model runs attention {runs!r}: nothing to compare")

    def verdicts(self, batch_name: str, gradients: bool) -> dict[str, Verdict]:
        """Errors of the visible hidden states, and for a step of every parameter's gradient.

        The yardstick is the larger error of the two unpatched models: both are plain PyTorch.
        """
        if (batch_name, gradients) in self._verdicts:
            return self._verdicts[batch_name, gradients]
        batch = self.source.batches[batch_name]
        exact = _answers(self.exact, batch, gradients)
        errors = {}
        for name, model in self.models.items():
            actual = _answers(model, batch, gradients)
            errors[name] = {key: Error.between(t, exact[key]) for key, t in actual.items()}
        plain = {key: max_error(errors["sdpa"][key], errors["eager"][key]) for key in exact}
        dtype = DTYPES[self.dtype]
        found = {name: judge(errors[name], plain, dtype) for name in self.models}
        self._verdicts[batch_name, gradients] = found
        return found

    def similarity_gap(self, batch: dict[str, Tensor]) -> float | None:
        """Largest difference of cosine similarities, patched against unpatched."""
        if "fasttx" not in self.models:
            return None
        ours, theirs = (_similarities(self.models[name], batch) for name in ("fasttx", "sdpa"))
        return (ours - theirs).abs().max().item()

    def contest(
        self, threads: int, batch: int, direction: str
    ) -> tuple[Group, dict[str, Contender]]:
        batch_name, batch = list(self.source.batches.items())[batch]
        verdicts = self.verdicts(batch_name, direction == "step")
        contenders = {
            name: Contender(LABELS[name], _call(model, batch, direction), verdicts[name])
            for name, model in self.models.items()
        }
        notes = list(self.source.notes)
        if direction == "step":
            notes.append("timed with the model's own dropout, checked without it")
        gap = self.similarity_gap(batch)
        if gap is not None:
            told = f"cosine similarities within {gap:.1e} of the unpatched model's"
            contenders["fasttx"].notes.append(told)
        group = Group(
            "model", NAME, f"{self.source.title}, {batch_name}", direction, self.dtype, BASE,
            _shape(batch), _facts(batch), flops=_flops(self.models["sdpa"], batch, direction),
            tokens=int(batch["attention_mask"].sum()), notes=notes,
        )  # fmt: skip
        return group, contenders


def fresh(dtype: str, batch: int, direction: str, provider: str, device: torch.device) -> Callable:
    """For a fresh process (fresh.py): one model; the smaller batch is the first row's start."""
    source = load(device)
    model = source.make(DTYPES[dtype], "eager" if provider == "eager" else "sdpa")
    whole = list(source.batches.values())[batch]
    small = {name: t[:1, :16] for name, t in whole.items()}

    def prepare():
        if provider.startswith("fasttx") and (why := _patch(model, provider == "fasttx_unpad")):
            raise ValueError(why)
        return [_call(model, given, direction) for given in (whole, small)]

    return prepare


def max_error(a: Error, b: Error) -> Error:
    return Error(max(a.rms, b.rms), max(a.largest, b.largest), a.scale)


def _patch(model: torch.nn.Module, unpad: bool) -> str | None:
    """Patches in place; the reason where that cannot be done."""
    try:
        patch = importlib.import_module("fasttx").patch
    except (ImportError, AttributeError) as error:
        return f"fasttx.patch is not there: {error}"
    try:
        patch(model, strict=True, **({"unpad": True} if unpad else {}))
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return str(error)
    return None


def _answers(
    model: torch.nn.Module, batch: dict[str, Tensor], gradients: bool
) -> dict[str, Tensor]:
    model.eval()
    visible = batch["attention_mask"].bool()
    with torch.set_grad_enabled(gradients):
        hidden = model(**batch).last_hidden_state[visible]
    found = {"out": hidden.detach()}
    if gradients:
        grads = _gradients(model, hidden)
        found["dparameters"] = torch.cat([grad.flatten().double() for grad in grads])
    return found


def _gradients(model: torch.nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    used = [p for name, p in model.named_parameters() if not name.startswith("pooler")]
    weight = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    return torch.autograd.grad((hidden * weight).mean(), used, allow_unused=False)


def _similarities(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.double()
    mask = batch["attention_mask"][..., None].double()
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return mean @ mean.T


def _call(model: torch.nn.Module, batch: dict[str, Tensor], direction: str) -> Callable[[], object]:
    if direction == "forward":

        def forward():
            model.eval()
            with torch.no_grad():
                return model(**batch).last_hidden_state

        return forward
    visible = batch["attention_mask"].bool()

    def step():
        model.train()
        return _gradients(model, model(**batch).last_hidden_state[visible])

    return step


def _flops(model: torch.nn.Module, batch: dict[str, Tensor], direction: str) -> int:
    with FlopCounterMode(display=False) as counter:
        _call(model, batch, direction)()
    return counter.get_total_flops()


def _shape(batch: dict[str, Tensor]) -> dict[str, Any]:
    rows, length = batch["input_ids"].shape
    return {"batch": rows, "queries": length, "keys": length}


def _facts(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {"padding": round(1 - batch["attention_mask"].float().mean().item(), 3)}
