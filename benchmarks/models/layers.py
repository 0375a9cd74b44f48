"""One layer of each family, as transformers runs it, under ``fasttx.patch`` and compiled, beside
fasttx.nn's layer and torch.nn's Transformer layer of the same weights.

The layers come out of models with one layer: what the model hands to its layer is caught on the way
(masks, positions, biases) and handed to it again around random hidden states. There is no padding.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contest import Bench as Contest
from ..contest import Case, Contender, Group, timed
from ..gate import Error, judge
from ..ops.attention_case import DTYPES
from ..rows import Run
from .families import FAMILIES, as_fasttx, compiled, patch

BASE = "sdpa"
DIRECTIONS = ("forward", "step")
LABELS = {
    "fasttx": "transformers + fasttx.patch",
    "fasttx_nn": "fasttx.nn",
    "fasttx_torch_nn": "torch.nn + fasttx.patch",
    "sdpa": "transformers",
    "torch_compile": "transformers, torch.compile",
    "torch_nn": "torch.nn",
}
SIZES = ((8, 128), (2, 512))
_NO_BIAS = "a position bias, which torch.nn's layers do not have"


@dataclass(frozen=True)
class Layer:
    """family: of FAMILIES. kind: the class of transformers' layer. part: what fasttx.models calls
    the stack it is in. one: the config of a model with one layer. torch_nn: why torch.nn has no
    such layer, or None."""

    family: str
    kind: str
    part: str
    one: dict[str, int]
    torch_nn: str | None = None


_T5, _BART = {"num_layers": 1, "num_decoder_layers": 1}, {"encoder_layers": 1, "decoder_layers": 1}
LAYERS = {
    "bert": Layer("bert-base", "BertLayer", "", {"num_hidden_layers": 1}),
    "roberta": Layer("roberta-base", "RobertaLayer", "", {"num_hidden_layers": 1}),
    "gpt2": Layer("gpt2", "GPT2Block", "", {"n_layer": 1}),
    "bloom": Layer("bloom", "BloomBlock", "", {"n_layer": 1}, _NO_BIAS),
    "t5": Layer("t5", "T5Block", "encoder.", _T5, _NO_BIAS),
    "t5-decoder": Layer("t5", "T5Block", "decoder.", _T5, _NO_BIAS),
    "bart": Layer("bart", "BartEncoderLayer", "encoder.", _BART),
    "bart-decoder": Layer("bart", "BartDecoderLayer", "decoder.", _BART),
}
VOCABULARY = 100


@dataclass
class Caught:
    """A layer, and what its model handed to it beside the hidden states and the memory."""

    layer: nn.Module
    positional: tuple
    named: dict[str, Any]
    memory_shape: torch.Size | None

    def __call__(self, layer: nn.Module, x: Tensor, memory: Tensor | None) -> Tensor:
        def given(value):
            is_memory = isinstance(value, Tensor) and value.shape == self.memory_shape
            return memory if is_memory and value.is_floating_point() else value

        named = {name: given(value) for name, value in self.named.items()}
        out = layer(x, *map(given, self.positional), **named)
        return out[0] if isinstance(out, tuple) else out


def catch(model: nn.Module, kind: str, part: str, size, memory: bool) -> Caught:
    """The layer of class `kind` in `part` of the model ("": not a seq2seq), caught as it runs."""
    found = []
    layers = [
        module
        for name, module in model.named_modules()
        if part in name + "." and any(c.__name__ == kind for c in type(module).__mro__)
    ]
    layer = layers[-1]
    hook = layer.register_forward_pre_hook(
        lambda module, positional, named: found.append((positional, named)), with_kwargs=True
    )
    device = next(model.parameters()).device
    ids = torch.zeros(size, dtype=torch.long, device=device)
    given = {"decoder_input_ids": ids} if part else {}
    try:
        with torch.no_grad():
            model(ids, **given)
    finally:
        hook.remove()
    (x, *positional), named = found[0]
    return Caught(layer, tuple(positional), named, x.shape if memory else None)


def cases(name: str, options) -> Iterator[Case]:
    sizes = [(options.batch, size) for size in options.sizes] or SIZES
    for dtype in options.dtypes:
        for size in sizes:
            for direction in filter(options.wants, DIRECTIONS):
                yield Case(
                    f"{name} layer {dtype} {direction} {size[0]} x {size[1]}",
                    {"name": name, "dtype": dtype, "size": size}, {"direction": direction},
                    options.threads[0],
                )  # fmt: skip


class Bench(Contest):
    """One layer in one dtype and size, on the same rounded weights everywhere, and in fp64;
    compiled too if torch.compile is `beside`."""

    def __init__(
        self, name: str, dtype: str, size: tuple[int, int], device: torch.device, run: Run,
        beside: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        transformers = importlib.import_module("transformers")
        self.name, self.dtype, self.size, self.device, self.run = name, dtype, size, device, run
        self.about = LAYERS[name]
        family = FAMILIES[self.about.family]
        values = {**family.config, **self.about.one, "vocab_size": VOCABULARY}
        config = getattr(transformers, family.config_class)(**values)
        config.use_cache = False
        torch.manual_seed(0)
        model = getattr(transformers, family.head)._from_config(config)
        model = model.to(device, DTYPES[dtype]).eval()
        self.width = model.get_input_embeddings().embedding_dim
        self.memory = self.about.part == "decoder."
        self.layers: dict[str, tuple[nn.Module, Callable]] = {}
        patched = copy.deepcopy(model)
        if (why := patch(patched)) is None:
            self._add("fasttx", patched, self.about.kind)
        else:
            run.skip(f"fasttx.patch on {name}", why)
        self._add_blocks(model)
        self._add("sdpa", model, self.about.kind)
        if "torch_compile" in (beside or {}):
            self._add("torch_compile", copy.deepcopy(model), self.about.kind)
            layer, call = self.layers["torch_compile"]
            self.layers["torch_compile"] = compiled(layer), call
        exact = copy.deepcopy(model).double()
        self._add("exact", exact, self.about.kind)
        self.exact = self.layers.pop("exact")
        self.x = self._inputs()

    def _add(self, name: str, model: nn.Module, kind: str) -> None:
        caught = catch(model, kind, self.about.part, self.size, self.memory)
        self.layers[name] = caught.layer, caught

    def _add_blocks(self, model: nn.Module) -> None:
        """fasttx.nn's layer, and from its weights torch.nn's, patched and not."""
        self._add("fasttx_nn", as_fasttx(model), "EncoderLayer")
        if self.about.torch_nn is not None:
            self.run.skip(f"torch.nn beside {self.name}", f"it has {self.about.torch_nn}")
            return
        layer = torch_layer(self.layers["fasttx_nn"][0]).to(self.device).eval()
        call = _memory_call if self.memory else _causal_call(layer, self.name, self.size[1])
        patched = copy.deepcopy(layer)
        if patch(patched) is None:
            self.layers["fasttx_torch_nn"] = patched, call
        self.layers["torch_nn"] = layer, call

    def _inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        names = ["x", "memory"] if self.memory else ["x"]
        found = {}
        for name in (*names, "upstream"):
            t = torch.randn(*self.size, self.width, generator=generator)
            found[name] = t.to(self.device, DTYPES[self.dtype])
        for name in names:
            found[name].requires_grad_()
        return found

    def contest(self, threads: int, direction: str) -> tuple[Group, dict[str, Contender]]:
        exact = self._answers(*self.exact, direction, {n: t.double() for n, t in self.x.items()})
        contenders, plain = {}, None
        for name in ("sdpa", *(n for n in self.layers if n != "sdpa")):
            work = partial(self._answers, *self.layers[name], direction, self.x)
            answers, seconds = timed(work)
            errors = {key: Error.between(t, exact[key]) for key, t in answers.items()}
            plain = plain or errors
            contenders[name] = self._contender(name, direction, errors, plain, seconds)
        batch, length = self.size
        group = Group(
            "layer", self.name, f"{self.name} layer, {batch} x {length}", direction, self.dtype,
            BASE, {"batch": batch, "queries": length, "columns": self.width}, tokens=batch * length,
            notes=["timed with the layer's own dropout, checked without it"]
            if direction == "step" else [],
        )  # fmt: skip
        return group, {name: contenders[name] for name in LABELS if name in contenders}

    def _contender(self, name, direction, errors, plain, seconds) -> Contender:
        verdict = judge(errors, plain, DTYPES[self.dtype])
        prepared = seconds if name == "torch_compile" else None
        return Contender(LABELS[name], self.call(name, direction), verdict, prepared)

    def call(self, name: str, direction: str) -> Callable[[], object]:
        """What is timed."""
        layer, call = self.layers[name]
        x = self.x

        def forward():
            layer.eval()
            with torch.no_grad():
                return call(layer, x["x"], x.get("memory"))

        def step():
            layer.train()
            return gradients(layer, call, x)

        return forward if direction == "forward" else step

    def _answers(self, layer, call, direction: str, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The output, and for a step the gradients of the inputs: those of the parameters lie
        otherwise in every layer."""
        layer.eval()
        if direction == "forward":
            with torch.no_grad():
                return {"out": call(layer, x["x"], x.get("memory"))}
        x = {n: t.detach().requires_grad_(n != "upstream") for n, t in x.items()}
        found = gradients(layer, call, x)
        return {f"d{name}": found[i] for i, name in enumerate(n for n in x if n != "upstream")}


def fresh(
    name: str, dtype: str, direction: str, size: tuple[int, int], provider: str,
    device: torch.device,
) -> Callable:  # fmt: skip
    """For a fresh process (fresh.py): the layers of all providers are made, one is measured."""
    run = Run("", "", {})
    made = [Bench(name, dtype, tuple(s), device, run, {provider: None}) for s in (size, (1, 16))]
    if provider not in made[0].layers:
        raise ValueError("; ".join(left_out["why"] for left_out in run.skipped))
    return lambda: [bench.call(provider, direction) for bench in made]


def gradients(layer: nn.Module, call: Callable, x: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Of the inputs, then of all parameters, by the chain from the same upstream gradient."""
    out = call(layer, x["x"], x.get("memory"))
    inputs = [t for n, t in x.items() if n != "upstream"]
    wanted = [*inputs, *(p for p in layer.parameters() if p.requires_grad)]
    return torch.autograd.grad(out, wanted, x["upstream"], allow_unused=True)


def _memory_call(layer: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    length = x.shape[1]
    mask = nn.Transformer.generate_square_subsequent_mask(length, x.device, x.dtype)
    return layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


def _causal_call(layer: nn.Module, name: str, length: int) -> Callable:
    """torch.nn's encoder layer, with a causal mask where the family is a decoder."""
    if name != "gpt2":
        return lambda layer, x, memory: layer(x)
    weight = layer.linear1.weight
    mask = nn.Transformer.generate_square_subsequent_mask(length, weight.device, weight.dtype)
    return lambda layer, x, memory: layer(x, src_mask=mask, is_causal=True)


def torch_layer(block: nn.Module) -> nn.Module:
    """torch.nn's TransformerEncoderLayer or TransformerDecoderLayer with the weights of fasttx.nn's
    layer, which must have LayerNorm, biases and no gate."""
    act = block.feed_forward.activation
    tanh = act == "gelu_tanh"
    options = {
        "d_model": block.feed_forward.linear1.in_features,
        "nhead": block.attention.heads,
        "dim_feedforward": block.feed_forward.linear1.out_features,
        "dropout": block.dropout,
        # Given torch's GELU module, its inference path leaves "tanh" out.
        "activation": partial(F.gelu, approximate="tanh") if tanh else act,
        "layer_norm_eps": block.norm1.eps,
        "norm_first": block.norm_first,
        "batch_first": True,
        "dtype": block.norm1.weight.dtype,
    }
    cross = getattr(block, "cross", None)
    made = (nn.TransformerEncoderLayer if cross is None else nn.TransformerDecoderLayer)(**options)
    state = {}

    def take(target: str, source: nn.Module) -> None:
        state.update({f"{target}.{n}": t for n, t in source.state_dict().items()})

    for n in ("weight", "bias"):
        state[f"self_attn.in_proj_{n}"] = getattr(block.attention.qkv, n)
    take("self_attn.out_proj", block.attention.out)
    take("linear1", block.feed_forward.linear1)
    take("linear2", block.feed_forward.linear2)
    take("norm1", block.norm1)
    take("norm2", block.norm2 if cross is None else block.norm_cross)
    made.self_attn.dropout = block.attention.dropout
    made.dropout.p = block.feed_forward.dropout.p
    if cross is not None:
        take("norm3", block.norm2)
        for n in ("weight", "bias"):
            parts = getattr(cross.q, n), getattr(cross.kv, n)
            state[f"multihead_attn.in_proj_{n}"] = torch.cat(parts)
        take("multihead_attn.out_proj", cross.out)
        made.multihead_attn.dropout = cross.dropout
    made.load_state_dict(state)
    return made
