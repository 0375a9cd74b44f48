"""Random small transformers models over the options of each family, and batches for them."""

import random

import torch
from torch import Tensor

VOCAB = 61
HEADS = {
    "bert": ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
             "ForQuestionAnswering"),
    "roberta": ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
                "ForQuestionAnswering"),
    "gpt2": ("LMHeadModel", "Model", "ForSequenceClassification", "ForTokenClassification",
             "ForQuestionAnswering"),
    "bloom": ("ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification",
              "ForQuestionAnswering"),
    "t5": ("ForConditionalGeneration", "Model", "ForSequenceClassification",
           "ForQuestionAnswering", "EncoderModel", "ForTokenClassification"),
    "bart": ("ForConditionalGeneration", "Model", "ForSequenceClassification",
             "ForQuestionAnswering"),
    "marian": ("MTModel", "Model"),
}  # fmt: skip
PREFIX = {"bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2", "bloom": "Bloom", "t5": "T5",
          "bart": "Bart", "marian": "Marian"}  # fmt: skip
ARCHITECTURES = [f"{PREFIX[f]}{h}" for f, hs in HEADS.items() for h in hs]
SEQ2SEQ = ("t5", "bart", "marian")


def family_of(name: str) -> str:
    return next(f for f, prefix in PREFIX.items() if name.startswith(prefix))


def options(family: str, rng: random.Random) -> dict:
    """A config's keywords: widths that are no multiples of 64, heads that are no powers of 2."""
    heads, size = 1, 4
    while heads * size < 14:  # the norm of 4 columns makes much of a rounding
        heads, size = rng.choice((1, 2, 3, 5, 6)), rng.choice((4, 7, 8, 10, 16))
    width, layers = heads * size, rng.choice((1, 2, 3))
    inner = rng.choice((20, 33, 52, 64))
    acts = ("gelu", "gelu_new", "relu", "silu")
    known = {"vocab_size": VOCAB, "tie_word_embeddings": rng.random() < 0.7}
    if family in ("bert", "roberta"):
        known |= {
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "intermediate_size": inner,
            "max_position_embeddings": rng.choice((24, 48)),
            "type_vocab_size": rng.choice((1, 2, 3)),
            "hidden_act": rng.choice(acts),
            "layer_norm_eps": rng.choice((1e-12, 1e-5, 1e-3)),
            "pad_token_id": 0 if family == "bert" else rng.choice((0, 1, 2)),
        }
    elif family == "gpt2":
        known |= {
            "n_embd": width,
            "n_head": heads,
            "n_layer": layers,
            "n_positions": rng.choice((24, 48)),
            "n_inner": rng.choice((None, inner)),
            "activation_function": rng.choice(acts),
            "scale_attn_weights": rng.random() < 0.8,
            "scale_attn_by_inverse_layer_idx": rng.random() < 0.3,
            "pad_token_id": 0,
        }
    elif family == "bloom":
        known |= {
            "hidden_size": width,
            "n_head": heads,
            "n_layer": layers,
            "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
            "pad_token_id": 0,
        }
    elif family == "t5":
        known |= {
            "d_model": rng.choice((36, width, 50)),
            "d_kv": size,
            "num_heads": heads,
            "d_ff": inner,
            "num_layers": layers,
            "num_decoder_layers": rng.choice((None, 1, 2)),
            "feed_forward_proj": rng.choice(("relu", "gated-gelu", "gated-silu", "gelu")),
            "relative_attention_num_buckets": rng.choice((4, 8, 32)),
            "relative_attention_max_distance": rng.choice((20, 128)),
            "decoder_start_token_id": 0,
            "eos_token_id": 60,
        }
    else:
        known |= {
            "d_model": 2 * width if family == "marian" else width,
            "encoder_layers": layers,
            "decoder_layers": rng.choice((1, 2)),
            "encoder_attention_heads": heads,
            "decoder_attention_heads": rng.choice((1, heads)),
            "encoder_ffn_dim": inner,
            "decoder_ffn_dim": rng.choice((inner, 24)),
            "max_position_embeddings": rng.choice((24, 48)),
            "activation_function": rng.choice(acts),
            "scale_embedding": rng.random() < 0.5,
            "pad_token_id": rng.choice((0, 1)),
            "decoder_start_token_id": 2,
            "eos_token_id": 60,
            "forced_eos_token_id": None,
        }
    # transformers cannot read its own folders of a BART of 2 labels.
    return known | {"num_labels": rng.choice((3, 5) if family == "bart" else (2, 3, 5))}


def model(name: str, rng: random.Random, **given):
    """(a transformers model in eval mode whose every parameter is random, its family)."""
    import transformers

    family = family_of(name)
    if "Question" in name:
        given["num_labels"] = 2
    config = getattr(transformers, f"{PREFIX[family]}Config")(**{**options(family, rng), **given})
    torch.manual_seed(rng.randrange(1 << 30))
    made = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for key, p in made.named_parameters():
            if family == "marian" and "embed_positions" in key:
                continue
            scale = 0.5 if "relative" in key else 1.4 * p.shape[-1] ** -0.5
            if family == "t5" and key.endswith("Attention.q.weight"):
                scale *= made.config.d_kv**-0.5  # the scale of the logits is in the weights
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * scale)
            else:
                p.add_(torch.randn_like(p) * 0.2)
        for key, b in made.named_buffers():
            if key == "final_logits_bias":
                b.normal_()
    return made, family


def batch(name: str, rng: random.Random) -> dict:
    """Token ids with padding on one side or nowhere; of an encoder-decoder two of them."""
    family = family_of(name)
    length, classified = rng.choice((3, 7, 13, 19)), "SequenceClassification" in name
    rows = 16 if classified else 4  # a result of a few numbers has an error by luck
    # transformers reads the first token of a row even where that is padding.
    first = family in ("bert", "roberta") and (classified or name.endswith("Model"))
    sides = ("none", "all real", "right", "right") + (() if first else ("left", "left"))
    given = _side(rng, rows, length, classified, sides)
    if family in SEQ2SEQ and "Encoder" not in name and "ForToken" not in name:
        if "SequenceClassification" not in name:
            target = _side(rng, rows, rng.choice((2, 5, 11)), False, sides)
            given |= {f"decoder_{key}": value for key, value in target.items()}
    elif family == "bert" and rng.random() < 0.5:
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    return given


def _side(rng: random.Random, rows: int, length: int, ends: bool, sides: tuple) -> dict:
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ids = torch.randint(3, 60, (rows, length), generator=g)
    padding = rng.choice(sides)
    sizes = torch.linspace(length, max(1, length // 3), rows).long()[:, None]
    at = torch.arange(length)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padding in ("left", "right"):
        mask = at < sizes if padding == "right" else at >= length - sizes
    if ends:  # one end token a row, the last that is real
        last = (at * mask).argmax(1)
        ids[torch.arange(rows), last] = 60
    given = {"input_ids": ids}
    if padding != "none":
        given["attention_mask"] = mask.long()
    return given


def fill_padding(given: dict, pad: int) -> dict:
    """Padding is the padding token, for the rules that count tokens by their ids."""
    for side in ("", "decoder_"):
        mask = given.get(f"{side}attention_mask")
        if mask is not None:
            given[f"{side}input_ids"].masked_fill_(mask == 0, pad)
    return given


def shown(out: Tensor, given: dict) -> Tensor:
    """The part of [B,S,...] or [B,...] that means something."""
    side = "decoder_" if "decoder_input_ids" in given else ""
    mask = given.get(f"{side}attention_mask")
    if mask is None or out.shape[:2] != mask.shape or out.dim() < 2:
        return out
    return out[mask.bool()]
