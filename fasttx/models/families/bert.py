"""BERT and RoBERTa."""

from ..config import Reader
from .family import Family, Rows, heads_of, padding_of, tokens_of


def _bert(c: Reader, *, pad: int = 0, **tokens) -> dict:
    c.refuse(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    d_model, dropout = c.size("hidden_size", 768), c.probability("hidden_dropout_prob", 0.1)
    fields = {
        "vocab_size": c.size("vocab_size", 30522),
        "d_model": d_model,
        "layers": c.size("num_hidden_layers", 12, 0),
        **heads_of(c, d_model, "num_attention_heads", 12),
        "d_ff": c.size("intermediate_size", 3072),
        "activation": c.activation("hidden_act", "gelu"),
        "eps": c.number("layer_norm_eps", 1e-12),
        "max_positions": c.size("max_position_embeddings", 512),
        "segments": c.size("type_vocab_size", 2),
        "embedding_norm": True,
        "embedding_dropout": dropout,
        "dropout": dropout,
        "attention_dropout": c.probability("attention_probs_dropout_prob", 0.1),
        "classifier_dropout": c.probability("classifier_dropout", dropout),
        "pooler": True,
        "init_std": c.number("initializer_range", 0.02),
        **tokens_of(c, pad=pad, **tokens),
    }
    return fields | padding_of(c, fields)


_BERT_NAMES = {
    "embedding.tokens": "embeddings.word_embeddings",
    "embedding.positions": "embeddings.position_embeddings",
    "embedding.segments": "embeddings.token_type_embeddings",
    "embedding.norm": "embeddings.LayerNorm",
    "stack.layers.{i}.attention.qkv": Rows(
        "encoder.layer.{i}.attention.self.query",
        "encoder.layer.{i}.attention.self.key",
        "encoder.layer.{i}.attention.self.value",
    ),
    "stack.layers.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
    "stack.layers.{i}.norm1": "encoder.layer.{i}.attention.output.LayerNorm",
    "stack.layers.{i}.feed_forward.linear1": "encoder.layer.{i}.intermediate.dense",
    "stack.layers.{i}.feed_forward.linear2": "encoder.layer.{i}.output.dense",
    "stack.layers.{i}.norm2": "encoder.layer.{i}.output.LayerNorm",
}

BERT = Family(
    topology="encoder",
    config=_bert,
    architectures={
        "base": "BertModel",
        "masked_lm": "BertForMaskedLM",
        "sequence_classification": "BertForSequenceClassification",
        "token_classification": "BertForTokenClassification",
        "question_answering": "BertForQuestionAnswering",
    },
    prefix="bert.",
    names=_BERT_NAMES,
    heads={
        "base": {"head.dense": "{base}pooler.dense"},
        "masked_lm": {
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.bias": "cls.predictions.bias",
            "head.out": "cls.predictions.decoder",
        },
        "sequence_classification": {
            "head.dense": "{base}pooler.dense",
            "head.out": "classifier",
        },
        "token_classification": {"head.out": "classifier"},
        "question_answering": {"head.out": "qa_outputs"},
    },
    tied={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    ignored=("embeddings.position_ids",),
    unused=("pooler.dense.", "cls.seq_relationship."),
    classifier="pooled",
)


def _roberta(c: Reader) -> dict:
    fields = _bert(c, pad=1, bos=0, eos=2)
    vocab = c.size("vocab_size", 50265)
    return fields | {"vocab_size": vocab, "padding_positions": True}


ROBERTA = Family(
    topology="encoder",
    config=_roberta,
    architectures={k: v.replace("Bert", "Roberta") for k, v in BERT.architectures.items()},
    prefix="roberta.",
    names=_BERT_NAMES,
    heads={
        "base": {"head.dense": "{base}pooler.dense"},
        "masked_lm": {
            "head.dense": "lm_head.dense",
            "head.norm": "lm_head.layer_norm",
            "head.bias": "lm_head.bias",
            "head.out": "lm_head.decoder",
        },
        "sequence_classification": {
            "head.dense": "classifier.dense",
            "head.out": "classifier.out_proj",
        },
        "token_classification": {"head.out": "classifier"},
        "question_answering": {"head.out": "qa_outputs"},
    },
    tied={"lm_head.decoder.bias": "lm_head.bias"},
    ignored=("embeddings.position_ids",),
    unused=("pooler.dense.",),
)
