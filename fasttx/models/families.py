"""The families as data: how a Hugging Face config becomes a Config, and which weights in a
Hugging Face folder are which of ours.

A rule of `names` is of a module, its parameters keep their names (weight, bias), or of one tensor.
{i} is a layer. A name on the right stands in the folder as it is, Rows are put below each other,
Transposed is stored [in, out], PerHead stores for each head its query, key and value rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .config import CheckpointError, Config, Reader

__all__ = ["FAMILIES", "HEADS", "PRESETS", "Family", "PerHead", "Rows", "Transposed", "configured"]

HEADS = (
    "base",
    "masked_lm",
    "causal_lm",
    "conditional_generation",
    "sequence_classification",
    "token_classification",
    "question_answering",
)


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
    """config: Reader -> fields of Config. architectures: head -> class in a folder's config;
    encoders: the same for a seq2seq family's encoder alone. prefix: of the base model's weights;
    bare: the heads whose folders leave it out. names: see above; heads: the same of each head, the
    prefix written as {base}. output: the head's weight that may be tied to the token table. tied:
    another name -> name of the same weights. ignored: endings of names that are no weights;
    unused: beginnings of names of parts that a head may do without; optional: zero where missing.
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
    # The classifier of a sequence: of its first token through a dense layer ("pooled": dropout in
    # front of the last layer, "first": in front of both), of its last token ("last"), or of the
    # decoder's state at the last end token ("eos").
    classifier: str = "first"


def _labels(c: Reader) -> dict:
    labels, count = c.get("id2label", None), c.size("num_labels")
    if labels is not None and not isinstance(labels, dict):
        raise c.error("id2label", labels, "an object")
    problem = c.get("problem_type", None)
    known = ("regression", "single_label_classification", "multi_label_classification")
    if problem is not None and problem not in known:
        raise c.error("problem_type", problem, f"null or one of {', '.join(known)}")
    return {"num_labels": count or len(labels or {}) or 2, "problem_type": problem}


def _tokens(c: Reader, pad=None, bos=None, eos=None) -> dict:
    return {
        "pad_token_id": c.token("pad_token_id", pad),
        "bos_token_id": c.token("bos_token_id", bos),
        "eos_token_id": c.token("eos_token_id", eos),
        "tied": c.flag("tie_word_embeddings", True),
        **_labels(c),
    }


def _heads(c: Reader, d_model: int, key: str, default: int) -> dict:
    heads = c.size(key, default)
    if d_model % heads:
        raise c.error(key, heads, f"a divisor of the width {d_model}")
    return {"heads": heads, "head_dim": d_model // heads}


def _gpt2(c: Reader) -> dict:
    c.refuse(add_cross_attention=False)
    d_model = c.size("n_embd", 768)
    return {
        "vocab_size": c.size("vocab_size", 50257),
        "d_model": d_model,
        "layers": c.size("n_layer", 12, 0),
        **_heads(c, d_model, "n_head", 12),
        "d_ff": c.size("n_inner") or 4 * d_model,
        "activation": c.activation("activation_function", "gelu_new"),
        "norm_first": True,
        "final_norm": True,
        "eps": c.number("layer_norm_epsilon", 1e-5),
        "max_positions": c.size("n_positions", 1024),
        "attention_scale": None if c.flag("scale_attn_weights", True) else 1.0,
        "layer_scale": c.flag("scale_attn_by_inverse_layer_idx", False),
        "embedding_dropout": c.probability("embd_pdrop", 0.1),
        "dropout": c.probability("resid_pdrop", 0.1),
        "attention_dropout": c.probability("attn_pdrop", 0.1),
        "classifier_dropout": c.probability("classifier_dropout", 0.1),
        "init_std": c.number("initializer_range", 0.02),
        **_tokens(c, bos=50256, eos=50256),
    }


GPT2 = Family(
    topology="decoder",
    config=_gpt2,
    architectures={
        "base": "GPT2Model",
        "causal_lm": "GPT2LMHeadModel",
        "sequence_classification": "GPT2ForSequenceClassification",
        "token_classification": "GPT2ForTokenClassification",
        "question_answering": "GPT2ForQuestionAnswering",
    },
    prefix="transformer.",
    names={
        "embedding.tokens": "wte",
        "embedding.positions": "wpe",
        "stack.layers.{i}.norm1": "h.{i}.ln_1",
        "stack.layers.{i}.attention.qkv": Transposed("h.{i}.attn.c_attn"),
        "stack.layers.{i}.attention.out": Transposed("h.{i}.attn.c_proj"),
        "stack.layers.{i}.norm2": "h.{i}.ln_2",
        "stack.layers.{i}.feed_forward.linear1": Transposed("h.{i}.mlp.c_fc"),
        "stack.layers.{i}.feed_forward.linear2": Transposed("h.{i}.mlp.c_proj"),
        "stack.norm": "ln_f",
    },
    heads={
        "causal_lm": {"head.out": "lm_head"},
        "sequence_classification": {"head.out": "score"},
        "token_classification": {"head.out": "classifier"},
        "question_answering": {"head.out": "qa_outputs"},
    },
    ignored=(".attn.bias", ".attn.masked_bias"),
    classifier="last",
)

FAMILIES = {"gpt2": GPT2}
PRESETS: dict[str, tuple[str, dict]] = {}


def configured(values: dict, where: str = "config", generation: dict | None = None) -> Config:
    """The Config of a config in Hugging Face's words; model_type names the family."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}"
        )
    family = FAMILIES[kind]
    fields = family.config(Reader(values, where))
    return Config(
        family=kind,
        topology=family.topology,
        generation=dict(generation or {}),
        source=dict(values),
        **fields,
    )


def plain(rule: str) -> str:
    return str(rule).removeprefix("{base}")


def modern(name: str) -> str:
    """Names of norms in folders of TensorFlow's time."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def output_names(family: Family, head: str) -> tuple[str | None, str]:
    """The names of a language model's output weight, None for another head, and of the tokens."""
    side = "encoder." if family.topology == "seq2seq" else ""
    tokens = f"{family.names[f'{side}embedding.tokens']}.weight"
    if head not in ("masked_lm", "causal_lm", "conditional_generation"):
        return None, tokens
    return f"{family.heads[head]['head.out']}.weight", tokens


def encoder_of(config: Config) -> Config:
    """The config of a seq2seq model's encoder alone."""
    return replace(config, topology="encoder")
