"""GPT-2."""

from ..config import Reader
from .family import COUNTS, Family, Transposed, heads_of, tokens_of


def _gpt2(c: Reader) -> dict:
    c.refuse(add_cross_attention=False)
    d_model = c.size("n_embd", 768)
    return {
        "vocab_size": c.size("vocab_size", 50257),
        "d_model": d_model,
        "layers": c.size("n_layer", 12, 0),
        **heads_of(c, d_model, "n_head", 12),
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
        **tokens_of(c, bos=50256, eos=50256),
    }


GPT2 = Family(
    topology="decoder",
    config=_gpt2,
    aliases={"hidden_size": "n_embd", "max_position_embeddings": "n_positions"} | COUNTS,
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
