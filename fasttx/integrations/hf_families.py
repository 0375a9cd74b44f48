"""What fasttx knows of transformers' models, as data: no transformers import, no code of theirs."""

NAME = "fasttx"  # attn_implementation

# model_type -> (module under transformers.models, prefix of its attention classes). Their self- and
# cross-attention are one text under different names: they call the attention interface, hand its
# masks over untouched and set is_causal themselves.
BERT_LIKE = {
    "bert": ("bert.modeling_bert", "Bert"),
    "bert-generation": ("bert_generation.modeling_bert_generation", "BertGeneration"),
    "camembert": ("camembert.modeling_camembert", "Camembert"),
    "data2vec-text": ("data2vec.modeling_data2vec_text", "Data2VecText"),
    "electra": ("electra.modeling_electra", "Electra"),
    "ernie": ("ernie.modeling_ernie", "Ernie"),
    "roberta": ("roberta.modeling_roberta", "Roberta"),
    "roberta-prelayernorm": (
        "roberta_prelayernorm.modeling_roberta_prelayernorm",
        "RobertaPreLayerNorm",
    ),
    "roc_bert": ("roc_bert.modeling_roc_bert", "RoCBert"),
    "xlm-roberta": ("xlm_roberta.modeling_xlm_roberta", "XLMRoberta"),
    "xlm-roberta-xl": ("xlm_roberta_xl.modeling_xlm_roberta_xl", "XLMRobertaXL"),
    "xmod": ("xmod.modeling_xmod", "Xmod"),
}


def _classes(kind: str) -> frozenset[str]:
    return frozenset(
        f"transformers.models.{module}.{prefix}{kind}Attention"
        for module, prefix in BERT_LIKE.values()
    )


CROSS_ATTENTION = _classes("Cross")
ATTENTION = _classes("Self") | CROSS_ATTENTION  # what `patch` replaces
CAUSAL_PADDING = frozenset(BERT_LIKE)  # model types that take hf_attention's five-dimensional mask
