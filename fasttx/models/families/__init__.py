"""The families: how a Hugging Face config becomes a Config, and which weights in a Hugging Face
folder are which of ours. Family and the rules' meaning: family.py."""

from dataclasses import replace

from ..config import CheckpointError, Config, Reader
from .bart import BART, MARIAN
from .bert import BERT, ROBERTA
from .bloom import BLOOM
from .gpt2 import GPT2
from .t5 import T5

__all__ = ["FAMILIES", "HEADS", "PRESETS", "configured", "encoder_of"]

HEADS = (
    "base",
    "masked_lm",
    "causal_lm",
    "conditional_generation",
    "sequence_classification",
    "token_classification",
    "question_answering",
)

FAMILIES = {
    "bart": BART,
    "bert": BERT,
    "bloom": BLOOM,
    "gpt2": GPT2,
    "marian": MARIAN,
    "roberta": ROBERTA,
    "t5": T5,
}

# Vaswani et al., arXiv 1706.03762, table 3, "base".
PRESETS: dict[str, tuple[str, dict]] = {
    "transformer": (
        "marian",
        {
            "d_model": 512,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "activation_function": "relu",
            "scale_embedding": True,
            "dropout": 0.1,
            "vocab_size": 37000,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "forced_eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    )
}


def configured(values: dict, where: str = "config", generation: dict | None = None) -> Config:
    """The Config of a config in Hugging Face's words; model_type names the family."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}"
        )
    family = FAMILIES[kind]
    renamed = {family.aliases.get(k, k): v for k, v in values.items()}
    fields = family.config(Reader({**renamed, **values}, where))
    return Config(
        family=kind,
        topology=family.topology,
        generation=dict(generation or {}),
        source=dict(values),
        **fields,
    )


def encoder_of(config: Config) -> Config:
    """The config of a seq2seq model's encoder alone."""
    return replace(config, topology="encoder")
