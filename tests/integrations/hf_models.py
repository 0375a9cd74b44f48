"""Small random transformers models, batches with padding, and the rule they are held to."""

import contextlib
import copy
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FACTOR = 1.5  # on an output, and on all gradients of a model together
# On one tensor's gradient, in a model of 35 columns: the ratio of the errors of two correct
# implementations was 0.6 to 2.2 over 16 seeds (median 1.0), of all gradients together 0.9 to 1.25.
EACH = 3.0
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def bert(cls: str = "BertModel", attn: str = "sdpa", **options):
    """A random BERT, dropout 0: head size 7, odd lengths; options override its config."""
    import transformers

    return _model(getattr(transformers, cls), transformers.BertConfig, attn, {}, options)


def roberta(cls: str = "RobertaModel", attn: str = "sdpa", **options):
    """A random RoBERTa, dropout 0: positions start after padding_idx 1."""
    import transformers

    known = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return _model(getattr(transformers, cls), transformers.RobertaConfig, attn, known, options)


def _model(cls, config_cls, attn, known, options):
    settings = {
        "vocab_size": 61,
        "hidden_size": 35,
        "num_attention_heads": 5,
        "num_hidden_layers": 2,
        "intermediate_size": 52,
        "max_position_embeddings": 48,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,  # attention far from uniform, so that a wrong mask shows
        **known,
        **options,
    }
    torch.manual_seed(1)
    return cls._from_config(config_cls(**settings), attn_implementation=attn).eval()


def gpt2(cls: str = "GPT2LMHeadModel", attn: str = "sdpa", **options):
    known = {"n_embd": 35, "n_head": 5, "n_layer": 2, "n_positions": 48, "initializer_range": 0.1}
    return _small(cls, "GPT2Config", attn, known, "resid_pdrop embd_pdrop attn_pdrop", options)


def bloom(cls: str = "BloomForCausalLM", attn: str = "eager", **options):
    known = {"hidden_size": 35, "n_head": 5, "n_layer": 2, "initializer_range": 0.1}
    return _small(cls, "BloomConfig", attn, known, "hidden_dropout attention_dropout", options)


def t5(cls: str = "T5ForConditionalGeneration", attn: str = "sdpa", **options):
    """A random T5 whose inner width is not its model width; distances reach past the buckets. Not
    its default relu: rounding to bfloat16 moves values across the kink, and the ratio of the errors
    of two correct gradients was 0.7 to 3.0 over 10 seeds (0.96 to 1.13 with gated-gelu)."""
    known = {
        "feed_forward_proj": "gated-gelu",
        "d_model": 36,
        "d_kv": 7,
        "num_heads": 5,
        "d_ff": 52,
        "num_layers": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
        "decoder_start_token_id": 0,
    }
    return _small(cls, "T5Config", attn, known, "dropout_rate", options)


def llama(cls: str = "LlamaForCausalLM", attn: str = "sdpa", **options):
    """A random Llama of 6 query heads over 2 key heads."""
    known = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 52,
        "max_position_embeddings": 48,
        "initializer_range": 0.1,
    }
    return _small(cls, "LlamaConfig", attn, known, "attention_dropout", options)


def bart(cls: str = "BartForConditionalGeneration", attn: str = "sdpa", **options):
    known = {
        "d_model": 35,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_position_embeddings": 48,
        "encoder_attention_heads": 5,
        "decoder_attention_heads": 7,
        "init_std": 0.1,
        "encoder_ffn_dim": 52,
        "decoder_ffn_dim": 44,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }
    names = "dropout attention_dropout activation_dropout"
    return _small(cls, "BartConfig", attn, known, names, options)


def _small(cls, config_cls, attn, known, dropouts, options):
    import transformers

    ids = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    settings = {**ids, **dict.fromkeys(dropouts.split(), 0.0), **known, **options}
    torch.manual_seed(1)
    config = getattr(transformers, config_cls)(**settings)
    return getattr(transformers, cls)._from_config(config, attn_implementation=attn).eval()


MODELS = {"bert": bert, "roberta": roberta}
CAUSAL = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}
FAMILIES = {"gpt2": gpt2, "bart": bart, "t5": t5, "bloom": bloom, "llama": llama}
SEQ2SEQ = ("bart", "t5")


def family_batch(kind: str, padding: str = "right", rows: int = 3, length: int = 11) -> dict:
    """What `batch` gives; for an encoder-decoder with 7 target tokens, padded on the same side."""
    given = batch("", padding, rows, length)
    if kind in SEQ2SEQ:
        target = batch("", padding, rows, 7)
        given |= {f"decoder_{name}": value for name, value in target.items()}
    return given


def batch(kind: str = "bert", padding: str = "right", rows: int = 3, length: int = 11) -> dict:
    """Token ids [rows, length], token types (BERT) and, unless padding is "none", the mask."""
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 61, (rows, length), generator=g)
    given = {"input_ids": ids}
    if kind == "bert":
        given["token_type_ids"] = torch.randint(0, 2, (rows, length), generator=g)
    if padding != "none":
        sizes = torch.linspace(length, 1, rows).long()[:, None]
        at = torch.arange(length)
        mask = at < sizes if padding == "right" else at >= length - sizes
        given["attention_mask"] = mask.long()
        ids[~mask] = 1 if kind == "roberta" else 0
    return given


def visible(given: dict) -> Tensor:
    """bool [rows, length]: where the output means something."""
    side = "decoder_" if "decoder_input_ids" in given else ""
    mask = given.get(f"{side}attention_mask")
    return torch.ones_like(given[f"{side}input_ids"]).bool() if mask is None else mask.bool()


class _Exact(TorchFunctionMode):
    """float64 stays float64 where transformers computes in float32 whatever the model's dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wide = args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64
        if wide and func is torch.Tensor.float:
            return args[0]
        if wide and func is torch.Tensor.to and torch.float32 in (*args, *kwargs.values()):
            return args[0]
        if wide and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextlib.contextmanager
def exactly(model):
    """The gold standard's context: nothing for a model in another dtype than float64."""
    if next(model.parameters()).dtype is not torch.float64:
        yield
        return
    from transformers.models.bloom import modeling_bloom

    slopes = modeling_bloom._get_alibi_slopes  # its products with positions round to float32
    wide = mock.patch.object(modeling_bloom, "_get_alibi_slopes", lambda *a: slopes(*a).double())
    with wide, _Exact():
        yield


def output(model, given: dict) -> Tensor:
    """The last hidden state, or the logits, where they mean something."""
    with exactly(model):
        out = model(**given)
    out = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    return out[visible(given)]


def gradients(model, given: dict) -> dict[str, Tensor]:
    """Every parameter's gradient of a fixed sum over the visible outputs."""
    model.zero_grad(set_to_none=True)
    out = output(model, given)
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    (out * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def floating(given: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def triple(model, dtype: torch.dtype):
    """(patched in dtype, unpatched in dtype, unpatched in fp64), of the same rounded weights."""
    import fasttx

    theirs = copy.deepcopy(model).to(dtype)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    fasttx.patch(ours, strict=True)
    if dtype is torch.float64:  # fp64 against itself: by another order of operations
        exact.set_attn_implementation("eager")
    return ours, theirs, exact


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def hold(name: str, got: Tensor, plain: Tensor, gold: Tensor) -> None:
    """rms(got - gold) <= FACTOR * rms(plain - gold) + one rounding at the result's scale."""
    assert got.shape == gold.shape
    assert got.isfinite().all(), f"{name}: not finite"
    error, theirs = rms(got.double() - gold), rms(plain.double() - gold)
    allowed = FACTOR * theirs + torch.finfo(got.dtype).eps * rms(gold)
    assert error <= allowed, (
        f"{name}: error {error:.3g}, unpatched {theirs:.3g}, {allowed:.3g} allowed"
    )


def hold_gradients(ours: dict, theirs: dict, gold: dict) -> None:
    """The same for each parameter's gradient (factor EACH) and for all together (FACTOR), each over
    its own scale. The key bias moves no probability and its gradient is rounding alone: it gets the
    scale of the query bias."""
    assert ours.keys() == theirs.keys() == gold.keys()
    total = torch.zeros(2, dtype=torch.float64)
    for name, exact in gold.items():
        assert ours[name].isfinite().all(), f"{name}: not finite"
        twin = name.replace(".key.bias", ".query.bias").replace("k_proj.bias", "q_proj.bias")
        scale = rms(gold[twin]) or 1.0
        errors = [rms(grads[name].double() - exact) / scale for grads in (ours, theirs)]
        allowed = EACH * errors[1] + torch.finfo(ours[name].dtype).eps
        assert errors[0] <= allowed, f"d{name}: {errors[0]:.3g}, {errors[1]:.3g} unpatched"
        total += torch.tensor(errors, dtype=torch.float64).square()
    got, plain = total.sqrt().tolist()
    assert got <= FACTOR * plain + torch.finfo(torch.float64).eps, (
        f"{got:.3g}, {plain:.3g} unpatched"
    )
