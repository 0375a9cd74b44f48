"""BLOOM."""

from ..config import Reader
from .family import COUNTS, Family, PerHead, heads_of, tokens_of
from .gpt2 import GPT2


def _bloom(c: Reader) -> dict:
    c.refuse(apply_residual_connection_post_layernorm=False)
    d_model = c.size("hidden_size", 64)
    return {
        "vocab_size": c.size("vocab_size", 250880),
        "d_model": d_model,
        "layers": c.size("n_layer", 2, 0),
        **heads_of(c, d_model, "n_head", 8),
        "d_ff": 4 * d_model,
        "activation": "gelu_tanh",
        "norm_first": True,
        "final_norm": True,
        "embedding_norm": True,
        "eps": c.number("layer_norm_epsilon", 1e-5),
        "positions": "alibi",
        "dropout": c.probability("hidden_dropout", 0.0),
        "attention_dropout": c.probability("attention_dropout", 0.0),
        "classifier_dropout": c.probability(
            "classifier_dropout", c.probability("hidden_dropout", 0.0)
        ),
        "init_std": c.number("initializer_range", 0.02),
        **tokens_of(c, bos=1, eos=2),
    }


BLOOM = Family(
    topology="decoder",
    config=_bloom,
    aliases={"n_embed": "hidden_size"} | COUNTS,
    architectures={
        "base": "BloomModel",
        "causal_lm": "BloomForCausalLM",
        "sequence_classification": "BloomForSequenceClassification",
        "token_classification": "BloomForTokenClassification",
        "question_answering": "BloomForQuestionAnswering",
    },
    prefix="transformer.",
    names={
        "embedding.tokens": "word_embeddings",
        "embedding.norm": "word_embeddings_layernorm",
        "stack.layers.{i}.norm1": "h.{i}.input_layernorm",
        "stack.layers.{i}.attention.qkv": PerHead("h.{i}.self_attention.query_key_value"),
        "stack.layers.{i}.attention.out": "h.{i}.self_attention.dense",
        "stack.layers.{i}.norm2": "h.{i}.post_attention_layernorm",
        "stack.layers.{i}.feed_forward.linear1": "h.{i}.mlp.dense_h_to_4h",
        "stack.layers.{i}.feed_forward.linear2": "h.{i}.mlp.dense_4h_to_h",
        "stack.norm": "ln_f",
    },
    heads=GPT2.heads,
    classifier="last",
)
