"""BART, and Marian: the sinusoidal encoder-decoder of the original Transformer."""

from dataclasses import replace

from ..config import Reader
from .family import Family, Rows, heads_of, padding_of, tokens_of


def _bart(c: Reader) -> dict:
    c.refuse(is_decoder=False)
    d_model, dropout = c.size("d_model", 1024), c.probability("dropout", 0.1)
    second = heads_of(c, d_model, "decoder_attention_heads", 16)
    fields = {
        "vocab_size": c.size("vocab_size", 50265),
        "d_model": d_model,
        "layers": c.size("encoder_layers", 12, 0),
        **heads_of(c, d_model, "encoder_attention_heads", 16),
        "d_ff": c.size("encoder_ffn_dim", 4096),
        "decoder_layers": c.size("decoder_layers", 12, 0),
        "decoder_heads": second["heads"],
        "decoder_d_ff": c.size("decoder_ffn_dim", 4096),
        "activation": c.activation("activation_function", "gelu"),
        "max_positions": c.size("max_position_embeddings", 1024),
        "reserved": 2,
        "embedding_norm": True,
        "embedding_scale": d_model**0.5 if c.flag("scale_embedding", False) else 1.0,
        "embedding_dropout": dropout,
        "dropout": dropout,
        "hidden_dropout": c.probability("activation_dropout", 0.0),
        "attention_dropout": c.probability("attention_dropout", 0.0),
        "classifier_dropout": c.probability("classifier_dropout", 0.0),
        "logits_bias": True,
        "init_std": c.number("init_std", 0.02),
        **tokens_of(c, pad=1, bos=0, eos=2, labels=3),
    }
    fields["decoder_start_token_id"] = c.token("decoder_start_token_id", 2)
    return fields | padding_of(c, fields)


def _bart_side(side: str) -> dict:
    layer = f"{side}.layers." + "{i}."
    attention = f"{layer}self_attn"
    return {
        f"{side}.embedding.positions": f"{side}.embed_positions",
        f"{side}.embedding.norm": f"{side}.layernorm_embedding",
        f"{side}.stack.layers.{{i}}.attention.qkv": Rows(
            f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"
        ),
        f"{side}.stack.layers.{{i}}.attention.out": f"{attention}.out_proj",
        f"{side}.stack.layers.{{i}}.norm1": f"{attention}_layer_norm",
        f"{side}.stack.layers.{{i}}.feed_forward.linear1": f"{layer}fc1",
        f"{side}.stack.layers.{{i}}.feed_forward.linear2": f"{layer}fc2",
        f"{side}.stack.layers.{{i}}.norm2": f"{layer}final_layer_norm",
    }


_BART_CROSS = "decoder.layers.{i}.encoder_attn"

BART = Family(
    topology="seq2seq",
    config=_bart,
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    },
    architectures={
        "base": "BartModel",
        "conditional_generation": "BartForConditionalGeneration",
        "sequence_classification": "BartForSequenceClassification",
        "question_answering": "BartForQuestionAnswering",
    },
    prefix="model.",
    names={
        "encoder.embedding.tokens": "shared",
        **_bart_side("encoder"),
        **_bart_side("decoder"),
        "decoder.stack.layers.{i}.cross.q": f"{_BART_CROSS}.q_proj",
        "decoder.stack.layers.{i}.cross.kv": Rows(f"{_BART_CROSS}.k_proj", f"{_BART_CROSS}.v_proj"),
        "decoder.stack.layers.{i}.cross.out": f"{_BART_CROSS}.out_proj",
        "decoder.stack.layers.{i}.norm_cross": f"{_BART_CROSS}_layer_norm",
    },
    heads={
        "conditional_generation": {"head.out": "lm_head", "head.bias": "final_logits_bias"},
        "sequence_classification": {
            "head.dense": "classification_head.dense",
            "head.out": "classification_head.out_proj",
        },
        "question_answering": {"head.out": "qa_outputs"},
    },
    tied={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    separate={
        "encoder.embedding.tokens": "encoder.embed_tokens",
        "decoder.embedding.tokens": "decoder.embed_tokens",
    },
    ignored=("coder.version",),
    optional=("final_logits_bias",),
    classifier="eos",
)


def _marian(c: Reader) -> dict:
    vocab = c.size("vocab_size", 58101)
    if c.size("decoder_vocab_size", vocab) != vocab:
        raise c.error("decoder_vocab_size", c.get("decoder_vocab_size", None), f"{vocab}")
    given = {"pad_token_id": 58100, "decoder_start_token_id": 58100, "eos_token_id": 0}
    fields = _bart(Reader({"vocab_size": vocab, **given, **c.values}, c.where))
    return fields | {
        "positions": "sinusoidal",
        "reserved": 0,
        "embedding_norm": False,
        "shared": c.flag("share_encoder_decoder_embeddings", True),
    }


# The sinusoidal encoder-decoder of the original Transformer, with its norms after each part.
MARIAN = replace(
    BART,
    config=_marian,
    architectures={"base": "MarianModel", "conditional_generation": "MarianMTModel"},
    heads={"conditional_generation": BART.heads["conditional_generation"]},
)
