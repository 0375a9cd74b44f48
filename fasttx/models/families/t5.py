"""T5, versions 1.0 and 1.1."""

from ..config import ACTIVATIONS, Reader
from .family import Family, Rows, tokens_of


def _t5(c: Reader) -> dict:
    c.refuse(is_decoder=False)
    d_model, dropout = c.size("d_model", 512), c.probability("dropout_rate", 0.1)
    kind = c.get("feed_forward_proj", "relu")
    gate, _, act = kind.rpartition("-") if isinstance(kind, str) else ("", "", "")
    act = "gelu_new" if kind == "gated-gelu" else act
    if gate not in ("", "gated") or act not in ACTIVATIONS:
        allowed = f"one of {', '.join(ACTIVATIONS)}, or one of them after 'gated-'"
        raise c.error("feed_forward_proj", kind, allowed)
    heads, layers = c.size("num_heads", 8), c.size("num_layers", 6, 0)
    d_ff = c.size("d_ff", 2048)
    buckets = c.size("relative_attention_num_buckets", 32, 4)
    if buckets % 2:
        raise c.error("relative_attention_num_buckets", buckets, "an even number")
    scaled = c.flag("scale_decoder_outputs", c.flag("tie_word_embeddings", True))
    tokens = tokens_of(c, pad=0, eos=1)
    return {
        "vocab_size": c.size("vocab_size", 32128),
        "d_model": d_model,
        "layers": layers,
        "heads": heads,
        "head_dim": c.size("d_kv", 64),
        "d_ff": d_ff,
        "decoder_layers": c.size("num_decoder_layers", layers, 0),
        "decoder_heads": heads,
        "decoder_d_ff": d_ff,
        "activation": ACTIVATIONS[act],
        "gated": gate == "gated",
        "norm": "rms",
        "norm_first": True,
        "final_norm": True,
        "final_dropout": True,
        "eps": c.number("layer_norm_epsilon", 1e-6),
        "bias": False,
        "positions": "relative",
        "buckets": buckets,
        "max_distance": c.size("relative_attention_max_distance", 128, buckets // 2 + 1),
        "attention_scale": 1.0,
        "embedding_dropout": dropout,
        "dropout": dropout,
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
        "classifier_dropout": c.probability("classifier_dropout", 0.0),
        "logit_scale": d_model**-0.5 if scaled else 1.0,
        "decoder_start_token_id": c.token("decoder_start_token_id", tokens["pad_token_id"]),
        **tokens,
    }


def _t5_side(side: str, last: int) -> dict:
    block = f"{side}.block." + "{i}.layer."
    attention, ffn = f"{block}0.SelfAttention", f"{block}{last}.DenseReluDense"
    return {
        f"{side}.position_bias": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{side}.stack.layers.{{i}}.attention.qkv": Rows(
            f"{attention}.q", f"{attention}.k", f"{attention}.v"
        ),
        f"{side}.stack.layers.{{i}}.attention.out": f"{attention}.o",
        f"{side}.stack.layers.{{i}}.norm1": f"{block}0.layer_norm",
        f"{side}.stack.layers.{{i}}.feed_forward.linear1": f"{ffn}.wi",
        f"{side}.stack.layers.{{i}}.feed_forward.gate": f"{ffn}.wi_1",
        f"{side}.stack.layers.{{i}}.feed_forward.linear2": f"{ffn}.wo",
        f"{side}.stack.layers.{{i}}.norm2": f"{block}{last}.layer_norm",
        f"{side}.stack.norm": f"{side}.final_layer_norm",
    }


_T5_CROSS = "decoder.block.{i}.layer.1.EncDecAttention"

T5 = Family(
    topology="seq2seq",
    config=_t5,
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    architectures={
        "base": "T5Model",
        "conditional_generation": "T5ForConditionalGeneration",
        "sequence_classification": "T5ForSequenceClassification",
        "question_answering": "T5ForQuestionAnswering",
    },
    encoders={"base": "T5EncoderModel", "token_classification": "T5ForTokenClassification"},
    prefix="transformer.",
    bare=("base", "conditional_generation", "question_answering"),
    names={
        "encoder.embedding.tokens": "shared",
        **_t5_side("encoder", 1),
        **_t5_side("decoder", 2),
        "decoder.stack.layers.{i}.cross.q": f"{_T5_CROSS}.q",
        "decoder.stack.layers.{i}.cross.kv": Rows(f"{_T5_CROSS}.k", f"{_T5_CROSS}.v"),
        "decoder.stack.layers.{i}.cross.out": f"{_T5_CROSS}.o",
        "decoder.stack.layers.{i}.norm_cross": "decoder.block.{i}.layer.1.layer_norm",
    },
    # The first map of a feed-forward layer has another name where there is a gate.
    gated={"DenseReluDense.wi.": "DenseReluDense.wi_0."},
    heads={
        "conditional_generation": {"head.out": "lm_head"},
        "sequence_classification": {
            "head.dense": "classification_head.dense",
            "head.out": "classification_head.out_proj",
        },
        "token_classification": {"head.out": "classifier"},
        "question_answering": {"head.out": "qa_outputs"},
    },
    tied={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    ignored=("EncDecAttention.relative_attention_bias.weight",),
    classifier="eos",
)
