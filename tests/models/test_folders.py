"""Folders out and in: what is written transformers reads whole, and the same comes back."""

import json
import random

import pytest
import torch

import fasttx
from fasttx import models

from .random_models import ARCHITECTURES, batch, family_of, fill_padding, model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def reloaded(name: str, folder):
    """What transformers makes of a folder, every key accounted for."""
    made, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not [k for k in info[kind] if "embed_positions" not in str(k)], kind
    return made.eval()


def same(one, other) -> None:
    without = unused(one)
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert [k for k in one if k not in without and not torch.equal(one[k], other[k])] == []


def unused(theirs) -> tuple[str, ...]:
    """What a model of transformers has but does not use, where nothing is tied."""
    if not hasattr(theirs.config, "tie_word_embeddings") or theirs.config.tie_word_embeddings:
        return ()
    return ("cls.predictions.bias", "lm_head.bias", "shared.weight", "model.shared.weight")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 8))]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(name, seed, tmp_path):
    rng = random.Random(f"folders {name} {seed}")
    theirs, _ = model(name, rng)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fasttx.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    same(theirs, reloaded(name, tmp_path / "ours"))
    again = fasttx.from_pretrained(tmp_path / "ours")
    same(ours, again)
    assert type(again) is type(ours)
    assert models.families.configured(again.config.source).d_model == ours.config.d_model


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_shards(name, tmp_path):
    theirs, _ = model(name, random.Random(1))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours = fasttx.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    same(theirs, reloaded(name, tmp_path / "ours"))
    same(ours, fasttx.from_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pickle_only_by_permission(name, tmp_path):
    theirs, family = model(name, random.Random(name))
    theirs.config.architectures = [name]
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(models.CheckpointError, match="allow_pickle=True"):
        fasttx.from_pretrained(tmp_path)
    loaded = fasttx.from_pretrained(tmp_path, allow_pickle=True)
    theirs.save_pretrained(tmp_path / "safe")
    same(loaded, fasttx.from_pretrained(tmp_path / "safe"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype, tmp_path):
    theirs, _ = model("GPT2LMHeadModel", random.Random(2))
    theirs.save_pretrained(tmp_path / "wide")
    narrow = fasttx.from_pretrained(tmp_path / "wide", dtype=dtype)
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    weight = narrow.transformer.stack.layers[0].attention.qkv.weight
    stored = theirs.transformer.h[0].attn.c_attn.weight.t()
    assert torch.equal(weight, stored.to(dtype))
    narrow.save_pretrained(tmp_path / "narrow")
    as_stored = fasttx.from_pretrained(tmp_path / "narrow")
    assert {p.dtype for p in as_stored.parameters()} == {dtype}
    assert json.loads((tmp_path / "narrow/config.json").read_text())["dtype"] == str(dtype)[6:]


def test_old_names(tmp_path):
    """Folders of early days: no prefix, norms of gamma and beta, buffers, a head for sentences."""
    from safetensors.torch import load_file, save_file

    theirs, _ = model("BertForMaskedLM", random.Random(3), tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in state.items()
    }
    renamed["bert.embeddings.position_ids"] = torch.arange(9)[None]
    renamed["cls.seq_relationship.weight"] = torch.zeros(2, 4)
    renamed["bert.pooler.dense.bias"] = torch.zeros(4)
    same_model = fasttx.from_pretrained(tmp_path)
    save_file(renamed, tmp_path / "model.safetensors")
    same(same_model, fasttx.from_pretrained(tmp_path))
    theirs, _ = model("GPT2LMHeadModel", random.Random(3), tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    same_model = fasttx.from_pretrained(tmp_path)
    save_file(bare, tmp_path / "model.safetensors")
    same(same_model, fasttx.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "BertForMaskedLM"]
)
def test_an_output_layer_of_its_own(name, tmp_path):
    """As transformers: where both are there and differ, they are not tied, whatever the config."""
    from safetensors.torch import load_file, save_file

    theirs, family = model(name, random.Random(4), tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    tokens = theirs.get_input_embeddings().weight
    output = {"t5": "lm_head.weight", "gpt2": "lm_head.weight"}.get(
        family, "cls.predictions.decoder.weight"
    )
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, output: tokens.detach().clone()}, tmp_path / "model.safetensors")
    assert fasttx.from_pretrained(tmp_path).config.tied
    save_file({**state, output: torch.randn(tokens.shape)}, tmp_path / "model.safetensors")
    ours = fasttx.from_pretrained(tmp_path)
    assert not ours.config.tied
    theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
    given = fill_padding(batch(name, random.Random(5)), theirs.config.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**given).logits[:, -1], theirs(**given).logits[:, -1], rtol=1e-3, atol=1e-3
        )


@torch.no_grad()
def test_t5_of_version_1_1(tmp_path):
    """Its folders of old say that nothing is tied, and mean that logits are not scaled too."""
    from safetensors.torch import load_file, save_file

    name = "T5ForConditionalGeneration"
    theirs, _ = model(name, random.Random(8), feed_forward_proj="gated-gelu")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    for output in ({}, {"lm_head.weight": torch.randn(state["shared.weight"].shape)}):
        save_file({**state, **output}, tmp_path / "model.safetensors")
        theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
        ours = fasttx.from_pretrained(tmp_path)
        assert ours.config.logit_scale == 1.0 and ours.config.tied == (not output)
        given = batch(name, random.Random(9))
        seen = given.get("decoder_attention_mask", torch.ones_like(given["decoder_input_ids"]))
        logits = [m(**given).logits[seen.bool()] for m in (ours, theirs)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-3)
        ours.save_pretrained(tmp_path / "again")
        same(theirs, reloaded(name, tmp_path / "again"))


def test_another_head(tmp_path):
    """A language model becomes a classifier: its body is read, the head starts at random."""
    theirs, _ = model("RobertaForMaskedLM", random.Random(6))
    theirs.save_pretrained(tmp_path)
    body = fasttx.from_pretrained(tmp_path, head="base")
    torch.manual_seed(0)
    ours = fasttx.from_pretrained(tmp_path, head="sequence_classification", num_labels=7)
    same(body.transformer, ours.transformer)
    assert ours.head.out.weight.shape[0] == 7 and 0 < ours.head.out.weight.std() < 0.05
    assert not ours.head.out.bias.any()
    ours.save_pretrained(tmp_path / "classifier")
    reloaded("RobertaForSequenceClassification", tmp_path / "classifier")
    same(ours, fasttx.from_pretrained(tmp_path / "classifier"))
    with pytest.raises(models.CheckpointError, match=r"head must be one of .*got 'causal_lm'"):
        fasttx.from_pretrained(tmp_path, head="causal_lm")


@pytest.mark.parametrize("family", [*models.FAMILIES, "transformer"])
def test_created(family, tmp_path):
    """A model with initial values trains, is saved, and transformers reads it."""
    small = {"vocab_size": 61, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
    sizes = {
        "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32},
        "bloom": {"hidden_size": 24, "n_layer": 2, "n_head": 3},
        "t5": {"d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 48, "num_layers": 2},
        "bert": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
                 "intermediate_size": 48},
    }  # fmt: skip
    sizes["roberta"] = sizes["bert"]
    bart = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3,
            "decoder_attention_heads": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
    head = {"bert": "masked_lm", "roberta": "masked_lm", "gpt2": "causal_lm", "bloom": "causal_lm"}
    kind = head.get(family, "conditional_generation")
    torch.manual_seed(0)
    ours = models.create(family, kind, **{**small, **sizes.get(family, bart)})
    assert ours.training
    ids = torch.randint(3, 61, (4, 12))
    optimizer = torch.optim.AdamW(ours.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        out = ours(ids, labels=ids)
        assert out.logits is None
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[0] < 6 and losses[-1] < losses[0] - 0.3, losses
    ours.save_pretrained(tmp_path)
    name = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    theirs = reloaded(name, tmp_path)
    given = {"input_ids": ids}
    if ours.config.topology == "seq2seq":
        given["decoder_input_ids"] = ids
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(**given).logits, theirs(**given).logits, rtol=1e-4, atol=1e-4
        )
    assert family_of(name) in (family, "marian")
