"""Folders into models: which weight is which, every key accounted for."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.embed import sinusoidal_positions
from . import families
from .checkpoint import Weights, listed
from .config import CheckpointError, Config, read_json
from .families.family import modern, output_names, unprefixed
from .heads import MODELS, BaseModel, architecture
from .initial import initialize
from .names import stored

__all__ = ["build", "create", "from_pretrained"]


def from_pretrained(
    folder,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    head: str | None = None,
    allow_pickle: bool = False,
    *,
    num_labels: int | None = None,
) -> BaseModel:
    """The model of a Hugging Face folder, in eval mode.

    Args:
        folder: with config.json and model.safetensors, or model.safetensors.index.json and its
            shards.
        dtype: of the parameters; None is that of the file.
        device: None is the CPU.
        head: None is that of the config's architecture. Another of fasttx.models.HEADS, to
            fine-tune: its own weights then start at random, everything else is read.
        allow_pickle: read pytorch_model.bin where there are no safetensors, by torch.load with
            weights_only=True, which runs no code of the file.
        num_labels: of a head that starts at random; None is the config's.

    Every key counts: one that is missing, one that nothing takes, and a shape that disagrees with
    the config is an error, before memory is taken. Memory is that of the weights and a few MB.

    Raises:
        CheckpointError: naming the file, the key and the reason; nothing is half loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(f"dtype must be None or a floating torch.dtype, got {dtype!r}")
    path = folder / "config.json"
    values = read_json(path)
    generation = folder / "generation_config.json"
    generation = read_json(generation) if generation.exists() else {}
    if num_labels is not None:
        values = {k: v for k, v in values.items() if k not in ("id2label", "label2id")}
        values["num_labels"] = num_labels
    config = families.configured(values, str(path), generation)
    config, own = _architecture(config, str(path), head)
    weights = Weights(folder, allow_pickle)
    return _Loading(config, head or own, own, weights).model(dtype, device)


def create(family: str, head: str, *, device=None, dtype=None, **options) -> BaseModel:
    """A model with initial values, in training mode. family: one of fasttx.models.FAMILIES, or
    "transformer", the original encoder-decoder; options: of its config, in Hugging Face's words."""
    kind, values = families.PRESETS.get(family, (family, {}))
    if kind == "bart":  # as transformers' config has it; a folder without the key has none
        values = {"forced_eos_token_id": 2}
    config = families.configured({**values, **options, "model_type": kind})
    return build(config, head, device=device, dtype=dtype)


def build(config: Config, head: str, *, device=None, dtype=None) -> BaseModel:
    if head not in MODELS:
        raise ValueError(f"head must be one of {', '.join(MODELS)}, got {head!r}")
    return MODELS[head](config, device=device, dtype=dtype)


def _architecture(config: Config, where: str, head: str | None) -> tuple[Config, str]:
    """The config, of its encoder alone where the architecture says so, and the folder's head."""
    family = families.FAMILIES[config.family]
    named = config.source.get("architectures")
    if named is None and head is not None:
        return config, head
    name = named[0] if isinstance(named, list) and named else named
    known = {v: (k, False) for k, v in family.architectures.items()}
    known |= {v: (k, True) for k, v in family.encoders.items()}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(
            f"{where}: architectures must name one of {', '.join(known)}, got {named!r}"
        )
    own, alone = known[name]
    config = families.encoder_of(config) if alone else config
    if head is not None:
        try:
            architecture(config, head)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
    return config, own


class _WithoutValues(TorchFunctionMode):
    """Modules made here get no initial values: on meta tensors torch would import a compiler's
    worth of code (140 MB) for them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        t = args[0] if args else kwargs.get("tensor")
        if isinstance(t, Tensor) and t.is_meta:
            if getattr(func, "__module__", "") == "torch.nn.init":
                return t
            if func in (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_):
                return t
        return func(*args, **kwargs)


class _Loading:
    """One folder on its way into a model of `head`; the folder's own head is `own`. Names here are
    without the prefix of the base model."""

    def __init__(self, config: Config, head: str, own: str, weights: Weights):
        self.family = families.FAMILIES[config.family]
        self.config, self.head, self.own, self.weights = config, head, own, weights
        self.found: dict[str, str] = {}
        for key in weights:
            plain = modern(key.removeprefix(self.family.prefix))
            if plain in self.found:
                raise CheckpointError(
                    f"{weights.where(key)}: {key} and {self.found[plain]} are the same weights"
                )
            self.found[plain] = key

    def model(self, dtype: torch.dtype | None, device) -> BaseModel:
        layers = self.config.layers + self.config.decoder_layers
        if layers > len(self.found):
            raise CheckpointError(
                f"{self.weights.folder}: config.json has {layers} layers, more than the weights "
                f"have tensors ({len(self.found)})"
            )
        self._settle()
        self._join()
        with _WithoutValues():
            model = build(self.config, self.head, device="meta", dtype=dtype or self._dtype())
        plan = dict(stored(model))
        self._account(model, plan)
        self._fill(model, plan, torch.device(device or "cpu"))
        return model.eval()

    def _settle(self) -> None:
        """What the config leaves open and the weights say: a pooler, an output layer of its own,
        positions that were learned."""
        rules = self.family.heads.get(self.head, {})
        if self.config.pooler:
            pooler = unprefixed(rules.get("head.dense", "")) + ".weight"
            self.config = replace(self.config, pooler=pooler in self.found)
        self._labels(rules)
        output, tokens = output_names(self.family, self.head, self.config.shared)
        sides = [f"{name}.weight" for name in self.family.separate.values()]
        separate = self.config.shared and not self.config.tied and sides
        if separate and all(side in self.found for side in sides):
            keys = [self.found[side] for side in sides]
            if not self.weights.equal(*keys) or (
                tokens in self.found and not self.weights.equal(keys[0], self.found[tokens])
            ):
                self.config = replace(self.config, shared=False)
                self.found.pop(tokens, None)
        elif output in self.found and tokens in self.found and self.config.tied:
            same = self.weights.equal(self.found[output], self.found[tokens])
            self.config = replace(self.config, tied=same)
        elif self.config.family == "t5" and output not in self.found:
            self.config = replace(self.config, tied=True)
        if self.config.positions == "sinusoidal":
            self._sinusoidal()

    def _labels(self, rules: dict) -> None:
        """The number of labels, where the config says nothing."""
        key = self.found.get(f"{rules.get('head.out')}.weight")
        said = {"num_labels", "id2label"} & self.config.source.keys()
        if key is not None and self.head == self.own and not said and "classif" in self.head:
            self.config = replace(self.config, num_labels=(*self.weights.shape(key), 0)[0])

    def _sinusoidal(self) -> None:
        """A file may hold the fixed positions, or learned ones in their place."""
        names = [f"{side}.embed_positions.weight" for side in ("encoder", "decoder")]
        names = [name for name in names if name in self.found]
        learned = {}
        for name in names:
            key = self.found[name]
            shape, dtype = self.weights.shape(key), self.weights.dtype(key)
            if len(shape) != 2 or shape[1] != self.config.d_model:
                raise self._disagrees(key, (self.config.max_positions, self.config.d_model))
            values = torch.empty(shape, dtype=dtype)
            self.weights.fill(key, values)
            fixed = sinusoidal_positions(*shape, interleaved=False)
            close = max(torch.finfo(dtype).eps, 1e-6) * 8
            if not torch.allclose(values.float(), fixed, rtol=0, atol=close):
                learned["max_positions"] = shape[0]
        if learned:
            self.config = replace(self.config, positions="learned", **learned)
        else:
            self.found = {k: v for k, v in self.found.items() if k not in names}

    def _join(self) -> None:
        """Weights that stand in a folder under two names become one, under ours."""
        output, tokens = output_names(self.family, self.head, self.config.shared)
        pairs = dict(self.family.tied)
        if not self.config.shared:
            pairs = {}
        if self.config.tied and output:
            pairs[output] = tokens
        for alias, name in pairs.items():
            if alias not in self.found:
                continue
            key = self.found.pop(alias)
            if name not in self.found:
                self.found[name] = key
            elif alias.endswith("decoder.bias") and not self.config.tied:
                self.found[name] = key  # transformers adds this one, the other has no use
            elif not self.weights.equal(key, self.found[name]):
                raise CheckpointError(
                    f"{self.weights.where(key)}: {key} must equal {self.found[name]}, to which it "
                    "is tied"
                )

    def _dtype(self) -> torch.dtype:
        kinds = {self.weights.dtype(key) for key in self.found.values()}
        kinds = {kind for kind in kinds if kind.is_floating_point}
        if len(kinds) == 1:
            return kinds.pop()
        source = self.config.source
        named = getattr(torch, str(source.get("dtype") or source.get("torch_dtype")), None)
        return named if named in kinds else torch.float32

    def _account(self, model: BaseModel, plan: dict) -> None:
        """Every key has its place and every place its key, of the right shape."""
        family, used, missing = self.family, set(), []
        new = self.head != self.own
        for name, place in plan.items():
            for plain, shape in zip(place.names, place.shapes, strict=True):
                used.add(plain)
                key = self.found.get(plain)
                if key is None:
                    if plain not in family.optional and not (new and name.startswith("head.")):
                        missing.append(plain)
                elif self.weights.shape(key) != shape:
                    raise self._disagrees(key, shape)
                elif not self.weights.dtype(key).is_floating_point:
                    raise CheckpointError(
                        f"{self.weights.where(key)}: {key} must be of a floating dtype, got "
                        f"{self.weights.dtype(key)}"
                    )
        others = family.unused
        if new:
            rules = [rule for head in family.heads.values() for rule in head.values()]
            others += tuple(unprefixed(rule) for rule in rules)
        unexpected = [
            self.found[plain]
            for plain in self.found.keys() - used
            if not plain.endswith(family.ignored or ("/",)) and not plain.startswith(others or "/")
        ]
        if missing or unexpected:
            kinds = {"missing": missing, "unexpected": unexpected}
            parts = [f"{kind} keys: {listed(keys)}" for kind, keys in kinds.items() if keys]
            raise CheckpointError(
                f"{self.weights.folder}: the weights are not those of "
                f"{architecture(model.config, self.head)}: {'; '.join(parts)}"
            )

    def _disagrees(self, key: str, shape) -> CheckpointError:
        return CheckpointError(
            f"{self.weights.where(key)}: {key} must have shape {tuple(shape)} by config.json, got "
            f"{self.weights.shape(key)}"
        )

    def _fill(self, model: BaseModel, plan: dict, device: torch.device) -> None:
        state, absent = model.state_dict(keep_vars=True), False
        for name, place in sorted(plan.items(), key=lambda entry: self._order(entry[1])):
            values = torch.empty(state[name].shape, dtype=state[name].dtype, device=device)
            for plain, view in zip(place.names, place.views(values), strict=True):
                if plain in self.found:
                    self.weights.fill(self.found[plain], view)
                else:
                    absent = True
                    view.zero_()
            module = model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(values)
            else:
                module._buffers[leaf] = values
        model.to(device)
        if absent and self.head != self.own and model.head is not None:
            self._begin(model, plan)

    def _order(self, place) -> tuple:
        """Tensors are read in the order of the disk."""
        key = self.found.get(place.names[0])
        return ("", 0) if key is None else self.weights.order(key)

    def _begin(self, model: BaseModel, plan: dict) -> None:
        """Initial values for the parts of a new head that the folder does not have."""
        for name, part in model.head.named_modules():
            places = [p for n, p in plan.items() if n.startswith(f"head.{name}.") and name]
            if places and not any(n in self.found for p in places for n in p.names):
                initialize(model, part)
