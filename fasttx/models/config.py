"""What a model is, in one vocabulary for every family."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ACTIVATIONS", "CheckpointError", "Config"]

# The names of activations in configs, and those of FeedForward.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class CheckpointError(ValueError):
    """A folder that cannot be loaded or saved: the file, the key and the reason."""


@dataclass(frozen=True)
class Config:
    """The widths, parts and special tokens of a model; `families.configured` makes one of a config
    in Hugging Face's words, which `source` keeps for save_pretrained.

    positions: "learned", "sinusoidal", "alibi" or "relative". max_positions: rows of a learned
    table, None where there is no limit. layer_scale: the logits of layer i are divided by i + 1 as
    well. final_norm, final_dropout: after the last layer. tied: the output layer is the token
    table, shared: the decoder's tokens are the encoder's; logit_scale multiplies what enters the
    output layer. The decoder_ fields are those of a seq2seq model.
    generation: the content of generation_config.json.
    """

    family: str
    topology: str
    vocab_size: int
    d_model: int
    layers: int
    heads: int
    head_dim: int
    d_ff: int
    activation: str = "gelu"
    gated: bool = False
    norm: str = "layer"
    norm_first: bool = False
    eps: float = 1e-5
    bias: bool = True
    positions: str = "learned"
    max_positions: int | None = None
    reserved: int = 0
    padding_positions: bool = False
    padding_idx: int | None = None
    segments: int = 0
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    buckets: int = 32
    max_distance: int = 128
    attention_scale: float | None = None
    layer_scale: bool = False
    final_norm: bool = False
    final_dropout: bool = False
    embedding_dropout: float = 0.0
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    decoder_layers: int = 0
    decoder_heads: int = 0
    decoder_d_ff: int = 0
    tied: bool = True
    shared: bool = True
    logit_scale: float = 1.0
    logits_bias: bool = False
    pooler: bool = False
    num_labels: int = 2
    problem_type: str | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    decoder_start_token_id: int | None = None
    init_std: float = 0.02
    generation: dict = field(default_factory=dict, repr=False)
    source: dict = field(default_factory=dict, repr=False)

    def limit(self) -> int | None:
        """The longest sequence that has positions."""
        if self.max_positions is None or self.positions != "learned":
            return None
        return self.max_positions - (self.padding_idx + 1 if self.padding_positions else 0)


def read_json(path: Path, megabytes: int = 100) -> dict:
    """A JSON object, or a CheckpointError naming the file."""
    try:
        if path.stat().st_size > megabytes << 20:
            raise CheckpointError(f"{path}: larger than {megabytes} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold an object, got {type(value).__name__}")
    return value


class Reader:
    """Values of a config by their Hugging Face names, each checked; `where` is named in errors."""

    def __init__(self, values: dict, where: str):
        self.values, self.where = values, where

    def error(self, key: str, value, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} must be {allowed}, got {value!r}")

    def get(self, key: str, default):
        value = self.values.get(key, default)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, least: int = 1) -> int | None:
        value = self.get(key, default)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= 1 << 30:
            raise self.error(key, value, f"an integer of at least {least}")
        return value

    def probability(self, key: str, default: float = 0.0) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise self.error(key, value, "a number in [0, 1)")
        return float(value)

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def activation(self, key: str, default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.error(key, value, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def token(self, key: str, default: int | None = None):
        """An id, several (as a tuple) or None; -1 is none, as in old folders."""
        value = self.get(key, default)
        if isinstance(value, list) and value:
            return tuple(self._token(key, v) for v in value)
        return None if value in (None, -1) else self._token(key, value)

    def _token(self, key: str, value) -> int:
        if type(value) is not int or value < 0:
            raise self.error(key, value, "a token id")
        return value

    def refuse(self, **only) -> None:
        """Options of which fasttx has one value alone."""
        for key, allowed in only.items():
            value = self.get(key, allowed)
            if value != allowed:
                raise self.error(key, value, f"{allowed!r}, the one this library has")
