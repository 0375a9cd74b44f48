"""Folders that are damaged, hostile or of something else, and calls that are wrong: one error each,
in words, before memory is taken."""

import json
import os
import random
import struct

import pytest
import torch

import fasttx
from fasttx import models
from fasttx.models import CheckpointError

SMALL = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    models.create("gpt2", "causal_lm", **SMALL).save_pretrained(path)
    return path


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def state(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def store(folder, tensors: dict) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")


def refused(folder, match: str, **options) -> None:
    with pytest.raises(CheckpointError, match=match):
        fasttx.from_pretrained(folder, **options)


def test_missing_files(folder, tmp_path):
    refused(tmp_path / "nowhere", "nowhere: is not a folder")
    refused(folder / "config.json", "is not a folder")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    refused(folder, r"no weights: model.safetensors .* is missing")
    (folder / "config.json").unlink()
    refused(folder, "config.json: the file is missing")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1]", "must hold an object, got list"),
        ("[" * 100_000, "is not JSON"),
        ('{"model_type": "albert"}', "model_type must be one of bart, bert.*, got 'albert'"),
        ('{"model_type": ["gpt2"]}', "model_type must be one of"),
        ("{}", "model_type must be one of .*, got None"),
        ('{"model_type": "gpt2", "architectures": ["GPT2DoubleHeadsModel"]}',
         "architectures must name one of .*GPT2LMHeadModel.*got ..GPT2DoubleHeadsModel"),
        ('{"model_type": "gpt2", "architectures": []}', "architectures must name one of"),
        ('{"model_type": "gpt2"}', "architectures must name one of"),
    ],
)  # fmt: skip
def test_configs_that_are_none(text, match, folder):
    (folder / "config.json").write_text(text)
    refused(folder, match)


def test_config_of_bytes(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "config.json: is not JSON")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", "61"),
        ("vocab_size", 61.0),
        ("vocab_size", True),
        ("n_embd", -24),
        ("n_embd", 1 << 60),
        ("n_head", 5),
        ("n_layer", -1),
        ("n_positions", []),
        ("n_inner", {}),
        ("activation_function", "tanh"),
        ("activation_function", ["gelu"]),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", -1e-5),
        ("layer_norm_epsilon", "1e-5"),
        ("resid_pdrop", 1.0),
        ("attn_pdrop", -0.1),
        ("scale_attn_weights", 1),
        ("add_cross_attention", True),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", 2.5),
        ("pad_token_id", "0"),
        ("id2label", [1]),
        ("problem_type", "sort"),
    ],
)
def test_wrong_values(key, value, folder):
    edit(folder, **{key: value})
    refused(folder, rf"config.json: {key} must be .*, got ")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("bert", "pad_token_id", 61),
        ("bert", "num_attention_heads", 7),
        ("t5", "feed_forward_proj", "gated"),
        ("t5", "feed_forward_proj", "swooped-gelu"),
        ("t5", "relative_attention_num_buckets", 7),
        ("t5", "relative_attention_max_distance", 3),
        ("bloom", "apply_residual_connection_post_layernorm", True),
        ("bart", "decoder_attention_heads", 11),
        ("marian", "share_encoder_decoder_embeddings", "no"),
        ("marian", "decoder_vocab_size", 12),
    ],
)
def test_wrong_values_of_families(family, key, value):
    values = {"model_type": family, "vocab_size": 61, "pad_token_id": 0, key: value}
    with pytest.raises(CheckpointError, match=f"{key} must be .*, got "):
        models.families.configured(values)


def test_shapes_that_disagree(folder):
    edit(folder, n_embd=27)
    refused(folder, r"model.safetensors: \S+ must have shape \(.*27.*\) by config.json, got")
    edit(folder, n_embd=24, vocab_size=60)
    refused(folder, r"transformer.wte.weight must have shape \(60, 24\) .*got \(61, 24\)")
    edit(folder, vocab_size=61, n_layer=3)
    refused(folder, "missing keys: h.2.attn.c_attn.bias")
    edit(folder, n_layer=1)
    refused(folder, "unexpected keys: transformer.h.1.attn.c_attn.bias")


def test_nothing_is_allocated_for_a_config_of_a_giant(folder):
    """The weights of these configs would be terabytes."""
    edit(folder, n_layer=1 << 30)
    refused(folder, "config.json has 1073741824 layers, more than the weights have tensors")
    edit(folder, n_embd=1 << 18, n_head=1 << 10, n_layer=2, vocab_size=1 << 23)
    refused(folder, "must have shape")


def test_keys(folder):
    tensors = state(folder)
    name = "transformer.h.1.ln_2.weight"
    store(folder, {k: v for k, v in tensors.items() if k != name})
    refused(folder, "missing keys: h.1.ln_2.weight$")
    store(folder, {**tensors, "transformer.h.1.extra": torch.zeros(2)})
    refused(folder, "unexpected keys: transformer.h.1.extra$")
    store(folder, {**tensors, "wte.weight": torch.zeros(61, 24)})
    refused(folder, "are the same weights")
    store(folder, {k.replace("wte", "wtf"): v for k, v in tensors.items()})
    refused(folder, "missing keys: wte.weight; unexpected keys: transformer.wtf.weight")
    store(folder, dict(list(tensors.items())[:3]))
    refused(folder, r"missing keys: .* and \d more")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_weights_that_are_not_finite(key, value, folder):
    tensors = state(folder)
    tensors[key][-1, -1] = value
    store(folder, tensors)
    refused(folder, f"model.safetensors: {key} holds NaN or infinity")


def test_large_values_are_no_infinities(folder):
    tensors = {k: v.half() for k, v in state(folder).items()}
    tensors["transformer.wte.weight"].fill_(60000)
    store(folder, tensors)
    assert fasttx.from_pretrained(folder).transformer.embedding.tokens.weight.max() == 60000
    tensors["transformer.wte.weight"] = torch.full((61, 24), 3e38)
    store(folder, tensors)
    fasttx.from_pretrained(folder)
    refused(folder, "wte.weight holds NaN or infinity", dtype=torch.float16)


def test_integers_are_no_weights(folder):
    tensors = state(folder)
    store(folder, {**tensors, "transformer.ln_f.weight": torch.ones(24, dtype=torch.int8)})
    refused(folder, "transformer.ln_f.weight must be of a floating dtype, got torch.int8")


def test_damaged_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    rng = random.Random(0)
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "model.safetensors: is not a whole safetensors file")
    (length,) = struct.unpack("<Q", whole[:8])
    loaded = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(8 + length)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            fasttx.from_pretrained(folder)
            loaded += 1
        except CheckpointError:
            continue
    assert loaded < 30
    path.write_bytes(struct.pack("<Q", 1 << 62) + whole[8:])
    refused(folder, "is not a whole safetensors file")


def test_a_file_cut_while_it_is_read(folder):
    from fasttx.models import checkpoint

    weights = checkpoint.Weights(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4000])
    last = max(weights, key=lambda name: weights._parts[name][3])
    with pytest.raises(CheckpointError, match=f"{last} cannot be read: the file ended early"):
        weights.fill(last, torch.empty(weights.shape(last)))


@pytest.fixture
def shards(tmp_path):
    path = tmp_path / "sharded"
    models.create("gpt2", "causal_lm", **SMALL).save_pretrained(path, max_shard_bytes=20_000)
    return path


def first(folder):
    return min(folder.glob("model-*.safetensors"))


def reindexed(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", ".", "",
     "sub/model.safetensors", "..\\secret.safetensors"],
)  # fmt: skip
def test_an_index_that_leaves_the_folder(file, shards):
    secret = shards.parent / "secret.safetensors"
    secret.write_bytes(first(shards).read_bytes())
    reindexed(shards, lambda i: i["weight_map"].update({"transformer.wte.weight": file}))
    refused(shards, "index.json: .* must be the name of a file in the folder")


def test_a_link_that_leaves_the_folder(shards, tmp_path):
    name = first(shards).name
    (shards / name).rename(tmp_path / "elsewhere")
    (shards / name).symlink_to(tmp_path / "elsewhere")
    refused(shards, "is a link to .*elsewhere, outside of the folder")
    (shards / name).unlink()
    (tmp_path / "elsewhere").rename(shards / "inside")
    (shards / name).symlink_to("inside")
    fasttx.from_pretrained(shards)


def test_a_cache_of_the_hub(shards, tmp_path):
    """There a model's files are links from snapshots/<revision> to blobs."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(shards.iterdir())):
        path.rename(blobs / f"{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    fasttx.from_pretrained(snapshot)


def test_indices(shards):
    name = first(shards).name
    reindexed(shards, lambda i: i["weight_map"].update({"transformer.no": name}))
    refused(shards, f"{name}: misses transformer.no")
    reindexed(shards, lambda i: i["weight_map"].update({"transformer.no": 3}))
    refused(shards, "transformer.no: the file's name must be a string")
    reindexed(shards, lambda i: i["weight_map"].pop("transformer.no"))
    (shards / name).unlink()
    refused(shards, f"{name}: the file is missing, named in model.safetensors.index.json")
    reindexed(shards, lambda i: i.update(weight_map=[]))
    refused(shards, "weight_map must be an object")
    (shards / "model.safetensors.index.json").write_text("no")
    refused(shards, "model.safetensors.index.json: is not JSON")


def test_pickles(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    tensors = state(folder)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({**tensors, "bomb": Bomb()}, path)
    refused(folder, "a pickle alone, which can hold code: pass allow_pickle=True")
    refused(folder, "pytorch_model.bin: cannot be read with weights_only", allow_pickle=True)
    assert not (tmp_path / "executed").exists()
    for content in ([1], {1: torch.zeros(2)}, {"a": 3}):
        torch.save(content, path)
        refused(folder, "must hold a dict of tensors by name", allow_pickle=True)
    path.write_bytes(b"PK\x03\x04 not a zip")
    refused(folder, "cannot be read with weights_only", allow_pickle=True)
    tensors["transformer.wte.weight"][3, 3] = float("nan")
    torch.save(tensors, path)
    refused(folder, "pytorch_model.bin: transformer.wte.weight holds NaN", allow_pickle=True)


def test_tied_weights_that_differ(tmp_path):
    small = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 61,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0
    }  # fmt: skip
    models.create("bart", "conditional_generation", **small).save_pretrained(tmp_path)
    tensors = state(tmp_path)
    store(tmp_path, {**tensors, "model.encoder.embed_tokens.weight": torch.randn(61, 24)})
    refused(tmp_path, "model.encoder.embed_tokens.weight must equal model.shared.weight")


def test_arguments(folder):
    for dtype in ("float32", torch.int8):
        with pytest.raises(ValueError, match="dtype must be None or a floating"):
            fasttx.from_pretrained(folder, dtype=dtype)
    refused(folder, "head must be one of base, causal_lm.*got 'masked_lm'", head="masked_lm")
    with pytest.raises(CheckpointError, match=r"model_type must be one of .*got 'gpt3'"):
        models.create("gpt3", "causal_lm")
    with pytest.raises(ValueError, match="head must be one of"):
        models.create("gpt2", "conditional_generation", **SMALL)
    with pytest.raises(ValueError, match="head must be one of"):
        models.create("gpt2", "poet", **SMALL)


def test_calls():
    torch.manual_seed(0)
    gpt = models.create("gpt2", "causal_lm", **SMALL).eval()
    ids = torch.randint(0, 61, (2, 9))
    for bad, match in (
        (ids[0], r"input_ids must be int64 or int32 \[B, S\], got torch.int64 \(9,\)"),
        (ids.float(), "input_ids must be int64 or int32"),
        (ids + 60, r"input_ids must be in \[0, 61\)"),
        (ids - 61, r"input_ids must be in \[0, 61\)"),
        (torch.zeros(1, 17).long(), "past the 16 positions of the model, got 17 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            gpt(bad)
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        gpt([[1]])
    for mask in (torch.ones(2, 8), torch.ones(9), torch.ones(2, 1, 9, 9)):
        with pytest.raises(ValueError, match=r"attention_mask must be \[B, S\] = \(2, 9\)"):
            gpt(ids, mask)
    with pytest.raises(ValueError, match=r"labels must be \[B, S\] = \(2, 9\), got \(2, 8\)"):
        gpt(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match=r"target must be in \[0, 61\)"):
        gpt(ids, labels=ids + 60)
    with pytest.raises(ValueError, match="length must be at most 16, the positions of the model"):
        gpt.new_cache(1, 17)
    cache = gpt.new_cache(2, 10)
    gpt.decode(ids, cache)
    with pytest.raises(ValueError, match="the room left of max_length 10"):
        gpt.decode(ids[:, :2], cache)
    body = models.create("gpt2", "base", **SMALL)
    with pytest.raises(ValueError, match="token_type_ids must be None for gpt2, a decoder"):
        body(ids, token_type_ids=ids)


def test_calls_of_encoder_decoders():
    torch.manual_seed(0)
    small = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 61,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0,
             "max_position_embeddings": 16, "eos_token_id": 60}  # fmt: skip
    bart = models.create("bart", "conditional_generation", **small).eval()
    ids = torch.randint(0, 60, (2, 9))
    for name, value, match in (
        ("decoder_input_ids", ids[0], r"decoder_input_ids must be int64 or int32 \[B, S\]"),
        ("decoder_input_ids", ids + 60, r"in \[0, 61\)"),
        ("decoder_input_ids", torch.zeros(2, 17).long(), "past the 16 positions"),
        ("decoder_attention_mask", torch.ones(2, 4), r"decoder_attention_mask must be \[B, S\]"),
        ("attention_mask", torch.ones(2, 4), r"attention_mask must be \[B, S\]"),
    ):
        with pytest.raises(ValueError, match=match):
            bart(ids, **{"decoder_input_ids": ids, name: value})
    classifier = models.create("bart", "sequence_classification", **small)
    with pytest.raises(ValueError, match="input_ids must hold the end token 60 in every sequence"):
        classifier(ids)


@pytest.mark.slow
def test_configs_at_random(folder):
    """A config of any values loads, or is one error."""
    rng, config = random.Random(1), json.loads((folder / "config.json").read_text())
    keys = [*config, "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings",
            "num_labels", "id2label", "problem_type", "eos_token_id", "pad_token_id", "dtype",
            "torch_dtype", "scale_attn_weights", "attn_pdrop", "hidden_size"]  # fmt: skip
    values = [None, 0, -1, 2, 1 << 40, 1e308, float("nan"), True, "", [], {}, "gelu", [1], 0.5]
    loaded = 0
    for _ in range(500):
        changed = dict(config)
        for _ in range(rng.choice((1, 1, 2))):
            changed[rng.choice(keys)] = rng.choice(values)
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            fasttx.from_pretrained(folder)
            loaded += 1
        except CheckpointError:
            continue
    assert 50 < loaded < 450
