"""What a family of models is: data.

A rule of `names` is of a module, whose parameters keep their names (weight, bias), or of one
tensor. {i} is a layer. A name on the right stands in a folder as it is, Rows are put below each
other, Transposed is stored [in, out], PerHead stores for each head its query, key and value rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..config import Reader

__all__ = [
    "COUNTS",
    "Family",
    "PerHead",
    "Rows",
    "Transposed",
    "heads_of",
    "labels_of",
    "modern",
    "output_names",
    "padding_of",
    "tokens_of",
    "unprefixed",
]


class Rows(tuple):
    """Names of tensors that stand below each other in ours."""

    def __new__(cls, *names: str):
        return super().__new__(cls, names)


class Transposed(str):
    """A name of a tensor stored [in, out]."""


class PerHead(str):
    """A name of a tensor of rows [heads, 3, head_dim]; ours are [3, heads, head_dim]."""


@dataclass(frozen=True)
class Family:
    """config: Reader -> fields of Config. aliases: other keys of a config. architectures: head ->
    class in a folder's config; encoders: the same for a seq2seq family's encoder alone.

    prefix: of the base model's weights; bare: the heads whose folders leave it out. names: see
    above; heads: the same of each head, the prefix written as {base}. gated: parts of names that
    differ where a feed-forward layer has a gate; separate: whole names where the sides have token
    tables of their own. tied: another name -> name of the same weights. ignored: endings of names
    that are no weights; unused: beginnings of names of parts that a head may do without; optional:
    zero where missing.

    classifier: what reads a sequence: its first token through a dense layer ("pooled": dropout in
    front of the last layer, "first": in front of both), its last token ("last"), or the decoder's
    state at the last end token ("eos").
    """

    topology: str
    config: Callable[[Reader], dict]
    architectures: dict[str, str]
    prefix: str
    names: dict[str, str | Rows]
    heads: dict[str, dict[str, str]]
    bare: tuple[str, ...] = ("base",)
    tied: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    encoders: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)
    separate: dict[str, str] = field(default_factory=dict)
    classifier: str = "first"


def unprefixed(rule: str) -> str:
    return str(rule).removeprefix("{base}")


def modern(name: str) -> str:
    """Names of norms in folders of TensorFlow's time."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def output_names(family: Family, head: str, shared: bool) -> tuple[str | None, str]:
    """The names of a language model's output weight, None for another head, and of the tokens."""
    side = "encoder." if family.topology == "seq2seq" else ""
    tokens = f"{family.names[f'{side}embedding.tokens']}.weight"
    if not shared:
        tokens = f"{family.separate['decoder.embedding.tokens']}.weight"
    if head not in ("masked_lm", "causal_lm", "conditional_generation"):
        return None, tokens
    return f"{family.heads[head]['head.out']}.weight", tokens


def labels_of(c: Reader, default: int) -> dict:
    labels, count = c.get("id2label", None), c.size("num_labels")
    if labels is not None and not isinstance(labels, dict):
        raise c.error("id2label", labels, "an object")
    problem = c.get("problem_type", None)
    known = ("regression", "single_label_classification", "multi_label_classification")
    if problem is not None and problem not in known:
        raise c.error("problem_type", problem, f"null or one of {', '.join(known)}")
    return {"num_labels": count or len(labels or {}) or default, "problem_type": problem}


COUNTS = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}


def padding_of(c: Reader, fields: dict) -> dict:
    """The token whose row in the table gets no gradient."""
    pad = fields["pad_token_id"]
    if pad is not None and pad >= fields["vocab_size"]:
        raise c.error("pad_token_id", pad, f"below vocab_size {fields['vocab_size']}")
    return {"padding_idx": pad}


def tokens_of(c: Reader, pad=None, bos=None, eos=None, labels: int = 2) -> dict:
    return {
        "pad_token_id": c.token("pad_token_id", pad),
        "bos_token_id": c.token("bos_token_id", bos),
        "eos_token_id": c.token("eos_token_id", eos),
        "tied": c.flag("tie_word_embeddings", True),
        **labels_of(c, labels),
    }


def heads_of(c: Reader, d_model: int, key: str, default: int) -> dict:
    heads = c.size(key, default)
    if d_model % heads:
        raise c.error(key, heads, f"a divisor of the width {d_model}")
    return {"heads": heads, "head_dim": d_model // heads}
