"""What fasttx knows of transformers' models, as data: no transformers import, no code of theirs.

A class is named by its module under transformers.models and its own name. What fasttx puts in its
place is a subclass of the same name in a module of this package, or nothing where the class reads
its attention from the config, so that the name alone is enough.
"""

from typing import NamedTuple

NAME = "fasttx"  # attn_implementation
# The same for a patched BLOOM. Unpatched it ignores its attention's name and adds the mask as a
# number, so under NAME it must get transformers' own masks.
PATCHED = "fasttx_patched"


class Attention(NamedTuple):
    """An attention class: the attribute with its head size, and the module here that holds its
    subclass (None: only the name in the config changes)."""

    head_size: str
    module: str | None = None
    name: str = NAME


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

ATTENTION = {
    **{
        f"{module}.{prefix}{kind}Attention": Attention("attention_head_size")
        for module, prefix in BERT_LIKE.values()
        for kind in ("Self", "Cross")
    },
    "gpt2.modeling_gpt2.GPT2Attention": Attention("head_dim"),
    "bart.modeling_bart.BartAttention": Attention("head_dim"),
    "t5.modeling_t5.T5Attention": Attention("key_value_proj_dim", "hf_t5"),
    "bloom.modeling_bloom.BloomAttention": Attention("head_dim", "hf_bloom", PATCHED),
    "llama.modeling_llama.LlamaAttention": Attention("head_dim", "hf_llama"),
}
FAMILIES = (*BERT_LIKE, "gpt2", "bart", "t5", "bloom", "llama")

# Those of them whose layers are BERT's too: LayerNorm after the residual, no adapters.
BERT_POST_NORM = tuple(
    where
    for family, where in BERT_LIKE.items()
    if family not in ("roberta-prelayernorm", "xlm-roberta-xl", "xmod")
)


class Head(NamedTuple):
    """A language-model head: the Linear that gives the logits; the class of its output; what comes
    before the Linear (a submodule, or "roberta" for the dense, gelu and norm of its lm_head); the
    buffer that is added to the logits instead of a bias; whether labels are shifted; whether they
    switch the cache off."""

    projection: str
    output: str
    transform: str | None = None
    bias: str | None = None
    causal: bool = False
    stops_cache: bool = False


_CROSS = "CausalLMOutputWithCrossAttentions"
_BERT = ("cls.predictions.decoder", "cls.predictions.transform")
HEADS = {
    "bert.modeling_bert.BertForMaskedLM": Head(_BERT[0], "MaskedLMOutput", _BERT[1]),
    "bert.modeling_bert.BertLMHeadModel": Head(
        _BERT[0], _CROSS, _BERT[1], causal=True, stops_cache=True
    ),
    "roberta.modeling_roberta.RobertaForMaskedLM": Head(
        "lm_head.decoder", "MaskedLMOutput", "roberta"
    ),
    "roberta.modeling_roberta.RobertaForCausalLM": Head(
        "lm_head.decoder", _CROSS, "roberta", causal=True, stops_cache=True
    ),
    "gpt2.modeling_gpt2.GPT2LMHeadModel": Head("lm_head", _CROSS, causal=True),
    "bloom.modeling_bloom.BloomForCausalLM": Head("lm_head", _CROSS, causal=True),
    "t5.modeling_t5.T5ForConditionalGeneration": Head("lm_head", "Seq2SeqLMOutput"),
    "bart.modeling_bart.BartForConditionalGeneration": Head(
        "lm_head", "Seq2SeqLMOutput", bias="final_logits_bias", stops_cache=True
    ),
    "llama.modeling_llama.LlamaForCausalLM": Head("lm_head", "CausalLMOutputWithPast", causal=True),
}
LOGITS = "_fasttx_logits"  # in the __dict__ of such a model: logits in training too

# Other classes that patch replaces, in models of FAMILIES: the module here that holds the subclass.
CLASSES = {
    **{
        f"{module}.{prefix}{kind}": "hf_bert"
        for module, prefix in BERT_POST_NORM
        for kind in ("Layer", "SelfOutput", "Output")
    },
    "bart.modeling_bart.BartEncoderLayer": "hf_bart",
    "bart.modeling_bart.BartDecoderLayer": "hf_bart",
    "t5.modeling_t5.T5LayerNorm": "hf_t5",
    "t5.modeling_t5.T5DenseActDense": "hf_t5",
    "t5.modeling_t5.T5DenseGatedActDense": "hf_t5",
    "gpt2.modeling_gpt2.GPT2MLP": "hf_gpt2",
    "bloom.modeling_bloom.BloomMLP": "hf_bloom",
    "llama.modeling_llama.LlamaRMSNorm": "hf_llama",
    "llama.modeling_llama.LlamaMLP": "hf_llama",
    "torch.nn.modules.normalization.LayerNorm": "hf_fused",
    "torch.nn.modules.linear.Linear": "hf_fused",
    "transformers.pytorch_utils.Conv1D": "hf_fused",
    **dict.fromkeys(HEADS, "hf_heads"),
}

CROSS_ATTENTION = frozenset(name for name in ATTENTION if name.endswith("CrossAttention"))
# Classes that run all layers of an encoder, replaced where padding is to be left out. Under this
# name BertGeneration has its whole model.
ENCODERS = {
    **{
        f"{module}.{prefix}Encoder": "hf_bert"
        for module, prefix in BERT_POST_NORM
        if prefix != "BertGeneration"
    },
    "t5.modeling_t5.T5Stack": "hf_t5",
    "bart.modeling_bart.BartEncoder": "hf_bart",
}

# Model types that hand hf_attention's five-dimensional mask over untouched.
CAUSAL_PADDING = frozenset(FAMILIES)
