"""GPT-2, BART, T5, BLOOM and Llama, patched, against transformers and fp64, over their options."""

import warnings

import pytest
import torch

import fasttx

from .hf_models import (
    FAMILIES,
    SEQ2SEQ,
    family_batch,
    floating,
    gradients,
    hold,
    hold_gradients,
    output,
    triple,
    visible,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fasttx.attention runs on the plain PyTorch"),
    pytest.mark.usefixtures("reference_allowed"),
]


def compare(model, given, dtype, *, backward=False):
    ours, theirs, exact = triple(model, dtype)
    low, wide = floating(given, dtype), floating(given, torch.float64)
    with torch.no_grad():
        hold("output", output(ours, low), output(theirs, low), output(exact, wide))
    if backward:
        grads = (gradients(m.train(), g) for m, g in ((ours, low), (theirs, low), (exact, wide)))
        hold_gradients(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_outputs_and_gradients(kind, padding, dtype):
    compare(FAMILIES[kind](), family_batch(kind, padding), dtype, backward=True)


OPTIONS = {
    "gpt2": [
        {"n_embd": 64, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
        {"n_embd": 33, "n_head": 3, "scale_attn_weights": False, "n_inner": 17},
        {"n_embd": 12, "n_head": 12, "reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False, "activation_function": "relu"},
    ],
    "bart": [
        {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 8},
        {"scale_embedding": True, "activation_function": "relu"},
        {"encoder_attention_heads": 1, "tie_word_embeddings": False},
    ],
    "t5": [
        {"d_kv": 16, "num_heads": 3, "feed_forward_proj": "relu"},
        {"tie_word_embeddings": False, "num_decoder_layers": 1},
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
        {"d_kv": 1, "num_heads": 1, "num_layers": 1},
    ],
    "bloom": [
        {"hidden_size": 64, "n_head": 4},
        {"n_head": 7, "apply_residual_connection_post_layernorm": True},
        {"hidden_size": 33, "n_head": 1, "tie_word_embeddings": False},
        {"hidden_size": 68, "n_head": 17, "n_layer": 1},
    ],
    "llama": [
        {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "mlp_bias": True},
        {"tie_word_embeddings": True, "hidden_act": "gelu"},
    ],
}
CASES = [(kind, options) for kind, several in OPTIONS.items() for options in several]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_options(kind, options):
    compare(FAMILIES[kind](**options), family_batch(kind, "left"), torch.float32, backward=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (5, 2)], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_lengths(kind, shape):
    compare(FAMILIES[kind](), family_batch(kind, "right", *shape), torch.float32)


def test_bloom_keeps_positions_apart_in_bfloat16():
    """transformers rounds ALiBi to bfloat16, where positions from 256 on coincide."""
    model = FAMILIES["bloom"](n_layer=1)
    ours, theirs, exact = triple(model, torch.bfloat16)
    given = family_batch("bloom", "none", 1, 600)
    with torch.no_grad():
        results = [output(m, given)[-100:].double() for m in (ours, theirs, exact)]
    errors = [(r - results[2]).square().mean().sqrt() for r in results[:2]]
    assert errors[0] < errors[1]


def test_gpt2_cross_attention():
    model = FAMILIES["gpt2"](add_cross_attention=True, use_cache=False)
    g = torch.Generator().manual_seed(4)
    given = family_batch("gpt2", "left")
    given["encoder_hidden_states"] = torch.randn(3, 6, 35, generator=g)
    given["encoder_attention_mask"] = family_batch("gpt2", "right", length=6)["attention_mask"]
    for dtype in (torch.float32, torch.bfloat16):
        compare(model, given, dtype, backward=True)


def settings(kind, cache="dynamic", **more):
    del kind
    return {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
        **more,
    }


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_generate(kind, padding):
    """Greedy tokens are the unpatched model's, with either kind of cache; and beams'."""
    model = FAMILIES[kind]()
    given = family_batch("", padding, length=6)
    theirs = model.generate(**given, **settings(kind))
    beams = model.generate(**given, **settings(kind, num_beams=2))
    fasttx.patch(model, strict=True)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(**given, **settings(kind, cache)), theirs), cache
    assert torch.equal(model.generate(**given, **settings(kind, num_beams=2)), beams)


@pytest.mark.parametrize("kind", FAMILIES)
def test_cache(kind):
    """Several tokens at once, then one by one, behind a left-padded prompt: as in one call."""
    model = FAMILIES[kind]()
    fasttx.patch(model, strict=True)
    given = family_batch(kind, "left")
    side = "decoder_" if kind in SEQ2SEQ else ""
    ids, mask = given.pop(f"{side}input_ids"), given.pop(f"{side}attention_mask")
    length = ids.shape[1]
    extra = {}
    if kind in SEQ2SEQ:
        with torch.no_grad():
            extra["encoder_outputs"] = model.get_encoder()(**given)
        extra["attention_mask"] = given["attention_mask"]
    with torch.no_grad():
        whole = model(**{f"{side}input_ids": ids, f"{side}attention_mask": mask}, **extra).logits
        cache, pieces = None, []
        for start, stop in ((0, 3), (3, length - 1), (length - 1, length)):
            step = {f"{side}input_ids": ids[:, start:stop], f"{side}attention_mask": mask[:, :stop]}
            out = model(**step, **extra, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[seen], whole[seen], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_output_attentions(kind):
    """The maps are those of the eager model, and the outputs stay right."""
    model = FAMILIES[kind](attn="eager")
    given = family_batch(kind, "right")
    with torch.no_grad():
        theirs = model(**given, output_attentions=True)
        fasttx.patch(model, strict=True)
        ours = model(**given, output_attentions=True)
        plain = model(**given)
    seen = visible(given)
    names = ("decoder_attentions", "cross_attentions", "encoder_attentions")
    for name in names if kind in SEQ2SEQ else ("attentions",):
        rows = given["attention_mask"].bool() if name == "encoder_attentions" else seen
        assert len(ours[name]) == len(theirs[name]) == 2
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a.transpose(1, 2)[rows], b.transpose(1, 2)[rows])
    torch.testing.assert_close(ours.logits[seen], theirs.logits[seen], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.logits[seen], theirs.logits[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bart", "llama"])
def test_by_name(kind):
    """attn_implementation="fasttx" alone serves these, without a word."""
    given = family_batch(kind, "left")
    theirs = FAMILIES[kind]()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="attn_implementation")
        named = FAMILIES[kind](attn="fasttx")
        named.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(
            output(named, given), output(theirs, given), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["t5", "bloom"])
def test_by_name_alone_is_right_and_says_so_once(kind):
    """T5's bias stays a tensor, BLOOM's attention transformers' own; patching serves both."""
    from fasttx.integrations import hf_attention

    hf_attention._tell_dense.cache_clear()
    hf_attention._tell_deaf.cache_clear()
    given, theirs = family_batch(kind, "left"), FAMILIES[kind]()
    named = FAMILIES[kind](attn="fasttx")
    named.load_state_dict(theirs.state_dict())
    expected = output(theirs, given)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match=r"fasttx\.patch\(model\)") as caught:
            torch.testing.assert_close(output(named, given), expected, rtol=1e-5, atol=1e-5)
        ours = [w for w in caught if issubclass(w.category, RuntimeWarning)]
        assert len(ours) == 1
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="attn_implementation")
            output(named, given)
            fasttx.patch(named, strict=True)
            torch.testing.assert_close(output(named, given), expected, rtol=1e-5, atol=1e-5)
        fasttx.unpatch(named)
        torch.testing.assert_close(output(named, given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bloom"])
def test_an_implementation_chosen_after_patching(kind):
    model, given = FAMILIES[kind](), family_batch(kind, "left")
    with torch.no_grad():
        expected = output(model, given)
        fasttx.patch(model, strict=True)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(output(model, given), expected, rtol=1e-5, atol=1e-5)


def test_a_hook_on_the_bias_table_still_runs():
    model, given = FAMILIES["t5"](), family_batch("t5", "right")
    fasttx.patch(model, strict=True)
    expected = output(model, given)
    calls = []
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    table.register_forward_hook(lambda *a: calls.append(1))
    torch.testing.assert_close(output(model, given), expected, rtol=1e-5, atol=1e-5)
    assert calls


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropout(kind):
    """The same rate as transformers': the spread over seeds agrees; evaluation has none."""
    name = {"gpt2": "attn_pdrop", "t5": "dropout_rate"}.get(kind, "attention_dropout")
    model, given = FAMILIES[kind](**{name: 0.3}), family_batch(kind, "right")
    spreads = []
    with torch.no_grad():
        expected = output(model, given)
        for patched in (False, True):
            if patched:
                fasttx.patch(model, strict=True)
                torch.testing.assert_close(output(model, given), expected, rtol=1e-5, atol=1e-5)
            model.train()
            torch.manual_seed(7)
            spreads.append(torch.stack([output(model, given) for _ in range(60)]).std(0).mean())
            model.eval()
    # two estimates from 60 draws each of a mean over some hundred outputs
    torch.testing.assert_close(spreads[0], spreads[1], rtol=0.1, atol=0)
