"""A training step, optimizer and all: fasttx.models and patched transformers beside the same script
on transformers, at the base sizes and at the toy sizes of the examples.

A step is that of `fasttx.training.fit`: the mean loss, its gradients, their norm read and clipped,
torch's fused AdamW. bf16 is autocast over float32 weights, as there. Checked are the gradients of
the first step, without dropout, against fp64, under the names of the Hugging Face folder.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..contest import Bench as Contest
from ..contest import Case, Contender, Group, timed
from ..gate import Error, judge
from ..ops.attention_case import DTYPES
from ..rows import Run
from .batches import LABELLED, make_batch
from .families import BASE, FAMILIES, LABELS, as_fasttx, compiled, made_ready, patch

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Toy:
    """A model of an example's size, and its batch: rows of source tokens from low to high, and of
    target tokens for a seq2seq model."""

    family: str
    config: dict[str, Any]
    rows: int
    source: tuple[int, int]
    target: tuple[int, int] | None = None


_NO_DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
TOYS = {
    "toy-bert": Toy(
        "bert-base",
        {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 512, "vocab_size": 2000, "max_position_embeddings": 128},
        32, (8, 48),
    ),
    "toy-gpt2": Toy(
        "gpt2",
        {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 2000}
        | _NO_DROPOUT,
        16, (256, 256),
    ),
    "toy-bloom": Toy(
        "bloom", {"hidden_size": 128, "n_layer": 4, "n_head": 4, "vocab_size": 2000}, 16, (256, 256)
    ),
    "toy-t5": Toy(
        "t5",
        {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 512, "num_layers": 2,
         "num_decoder_layers": 2, "dropout_rate": 0.0, "vocab_size": 72},
        128, (4, 14), (3, 13),
    ),
    "toy-bart": Toy(
        "bart",
        {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 512,
         "decoder_ffn_dim": 512, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "max_position_embeddings": 128, "vocab_size": 2000},
        32, (16, 48), (16, 48),
    ),
}  # fmt: skip
NAMES = (*FAMILIES, *TOYS)


@dataclass
class Job:
    """A model and its batches by size; `make` builds one more copy of it, in float32."""

    name: str
    title: str
    make: Callable[[], nn.Module]
    sizes: tuple[tuple[int, int], ...]
    batch: Callable[[nn.Module, tuple[int, int]], dict[str, Tensor]]


def job(name: str) -> Job:
    transformers = importlib.import_module("transformers")
    toy = TOYS.get(name)
    family = FAMILIES[toy.family if toy else name]
    extra = toy.config | _ids(family.kind) if toy else {}
    config = getattr(transformers, family.config_class)(**{**family.config, **extra})
    config.use_cache = False

    def make() -> nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, family.head)._from_config(copy.deepcopy(config)).float()

    if toy is None:
        layers = family.config.get("num_hidden_layers") or family.config.get("n_layer")
        title = f"{name}, {layers} layers" if layers else f"{name}, short"

        def batch(model, size):
            return make_batch(model.config, family.kind, size, "cpu")

        return Job(name, title, make, family.batches["step"], batch)
    sizes = ((toy.rows, toy.source[1]),)
    return Job(name, name, make, sizes, lambda model, size: _toy_batch(toy, family.kind))


def _ids(kind: str) -> dict[str, int]:
    """Special tokens within the small vocabulary."""
    found = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return found | ({"decoder_start_token_id": 0} if kind == "seq2seq" else {})


def _toy_batch(toy: Toy, kind: str) -> dict[str, Tensor]:
    """Random ids, lengths even over their range, padding on the right."""
    generator = torch.Generator().manual_seed(0)

    def rows(low: int, high: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(low, high + 1, (toy.rows,), generator=generator)
        lengths[0] = high
        ids = torch.randint(5, toy.config["vocab_size"], (toy.rows, high), generator=generator)
        return ids, torch.arange(high) < lengths[:, None]

    ids, seen = rows(*toy.source)
    batch = {"input_ids": ids.where(seen, 0), "attention_mask": seen.long()}
    if kind == "seq2seq":
        ids, seen = rows(*toy.target)
    elif kind == "masked":
        seen = seen & (torch.rand(ids.shape, generator=generator) < LABELLED)
    return batch | {"labels": ids.masked_fill(~seen, -100)}


def cases(name: str, options) -> Iterator[Case]:
    work = job(name)
    for dtype in options.dtypes:
        for size in work.sizes:
            yield Case(
                f"training {work.title} {dtype} {size[0]} x {size[1]}",
                {"name": name, "dtype": dtype}, {"size": size}, options.threads[0],
            )  # fmt: skip


class Bench(Contest):
    """One job in one dtype on one device; compiled too if torch.compile is `beside`."""

    def __init__(
        self, name: str, dtype: str, device: torch.device, run: Run,
        beside: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.job = work = job(name)
        self.dtype, self.device, self.run = dtype, device, run
        plain = work.make().to(device)
        self.exact = copy.deepcopy(plain).double()
        self.models = {"sdpa": plain}
        patched = copy.deepcopy(plain)
        why = patch(patched)
        if why is None:
            self.models["fasttx"] = patched
        else:
            run.skip(f"fasttx.patch on {work.name}", why)
        self.models["fasttx_models"] = as_fasttx(plain)
        if "torch_compile" in (beside or {}):
            self.models["torch_compile"] = compiled(copy.deepcopy(plain))

    def contest(self, threads: int, size: tuple[int, int]) -> tuple[Group, dict[str, Contender]]:
        batch = self.job.batch(self.models["sdpa"], size)
        batch = {name: t.to(self.device) for name, t in batch.items()}
        exact = gradients_by_name(self.exact, batch, "fp64")
        names = [name for name in LABELS if name in self.models]
        errors, seconds, flops = {}, {}, None
        for name in names:
            # torch.compile leaves what it first meets under such a mode uncompiled for good.
            counter = FlopCounterMode(display=False) if name == "sdpa" else nullcontext()
            with counter:
                work = partial(gradients_by_name, self.models[name], batch, self.dtype)
                found, seconds[name] = timed(work)
            errors[name] = {"dparameters": _error(found, exact)}
            flops = counter.get_total_flops() if name == "sdpa" else flops
        contenders = {}
        for name in names:
            verdict = judge(errors[name], errors["sdpa"], DTYPES[self.dtype])
            step = training_step(self.models[name], batch, self.dtype)
            prepared = seconds[name] if name == "torch_compile" else None
            contenders[name] = Contender(LABELS[name], step, verdict, prepared)
        rows, length = batch["input_ids"].shape
        group = Group(
            "train", self.job.name, f"training {self.job.title}, {rows} x {length}", "train",
            self.dtype, BASE, {"batch": rows, "queries": length}, flops=flops,
            tokens=tokens(batch),
            notes=["forward, backward, clipping and AdamW; timed with the model's own dropout, "
                   "checked without it"],
        )  # fmt: skip
        return group, contenders


def fresh(
    name: str, dtype: str, size: tuple[int, int], provider: str, device: torch.device
) -> Callable:
    """For a fresh process (fresh.py): one model. The smaller batch is the first row's start, so
    that the moments of AdamW are there before memory is measured."""
    work = job(name)
    model = work.make().to(device)
    batch = {n: t.to(device) for n, t in work.batch(model, tuple(size)).items()}
    small = {n: t[:1, :16] for n, t in batch.items()}

    def prepare():
        ready = made_ready(model, provider)
        step = partial(training_step, ready, dtype=dtype)
        return step(batch), step(small)

    return prepare


def tokens(batch: dict[str, Tensor]) -> int:
    """Real tokens of the source and, for seq2seq models, whose labels are others, of the target."""
    count = int(batch["attention_mask"].sum())
    apart = batch["labels"].shape != batch["input_ids"].shape
    return count + (int((batch["labels"] != -100).sum()) if apart else 0)


def _autocast(model: nn.Module, dtype: str):
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")


def training_step(model: nn.Module, batch: dict[str, Tensor], dtype: str) -> Callable[[], float]:
    """The step of `fasttx.training.fit`, for any model."""
    training = importlib.import_module("fasttx.training.optimizer")
    options = importlib.import_module("fasttx.training.options").TrainOptions
    given = options(steps=1, learning_rate=LEARNING_RATE)
    optimizer = training.make_optimizer(model, given)
    parameters = list(model.parameters())

    def step() -> float:
        model.train()
        with _autocast(model, dtype):
            loss = model(**batch).loss
        loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        value, norm = torch.stack([loss.detach().double(), norm.double()]).tolist()
        if norm > given.clip:
            torch._foreach_mul_(gradients, given.clip / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return step


def gradients_by_name(model: nn.Module, batch: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The gradients of one step, in the names and layout of the model's Hugging Face folder: that
    of a model whose weights they are."""
    safetensors = importlib.import_module("safetensors.torch")
    model.eval()
    with _autocast(model, dtype):
        loss = model(**batch).loss
    loss.backward()
    holder = copy.deepcopy(getattr(model, "_orig_mod", model))
    with torch.no_grad():
        for own, p in zip(holder.parameters(), model.parameters(), strict=True):
            own.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    model.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as home:
        holder.save_pretrained(home)
        return safetensors.load_file(str(Path(home, "model.safetensors")))


def _error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Error:
    names = sorted(found.keys() & exact.keys())
    if not names:
        return Error(float("inf"), float("inf"), 0.0)
    one, other = (torch.cat([d[n].double().flatten() for n in names]) for d in (found, exact))
    return Error.between(one, other)
