"""Embedding space and probabilities against plain formulas."""

import pytest
import torch

import fasttx
from fasttx.inspect import look
from fasttx.inspect.words import TEMPERATURES, distribution, space
from tests.inspect.small import TEXT, long, ours, theirs, tokenizer

pytest.importorskip("transformers", reason="transformers is not installed")


def test_points_are_the_principal_axes():
    table = torch.randn(50, 12) * torch.linspace(3, 0.2, 12) + 1
    found = space(table, [4, 9, 4, 30])
    assert found.ids == [4, 9, 30]
    centred = (table - table.mean(0)).double()
    _, size, axes = torch.linalg.svd(centred, full_matrices=False)
    wanted = centred @ axes[:3].T
    places = torch.tensor([found.points[i] for i in found.ids], dtype=torch.float64)
    torch.testing.assert_close(places.abs(), wanted[found.ids].abs(), rtol=1e-3, atol=1e-3)
    share = (size**2 / (size**2).sum())[:3].tolist()
    assert found.variance == pytest.approx(share, rel=1e-4)


def test_neighbours_are_the_nearest_by_angle():
    table = torch.randn(40, 6)
    found = space(table, [3, 8], count=5)
    cosine = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    cosine.fill_diagonal_(-2)
    values, ids = cosine[[3, 8]].topk(5)
    assert torch.equal(found.near, ids)
    torch.testing.assert_close(found.cosine, values)
    assert set(found.points) == {3, 8, *ids.flatten().tolist()}


def test_a_table_narrower_than_the_space():
    found = space(torch.randn(9, 2), [1])
    assert all(len(p) == 3 for p in found.points.values())


def test_probabilities_are_softmax_at_every_temperature():
    logits = torch.randn(30) * 4
    found = distribution(7, logits, 5)
    for t in TEMPERATURES:
        wanted, ids = (logits.double() / t).softmax(0).topk(5)
        assert found.ids == ids.tolist()
        assert found.probabilities(t) == pytest.approx(wanted.tolist(), rel=1e-9)


@pytest.mark.filterwarnings("ignore:fasttx.* runs on the plain PyTorch reference")
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_the_models_own_logits_are_shown(family, tmp_path):
    model = ours(family, tmp_path).double()
    text = TEXT.replace("teacher", "<mask>") if family == "bert" else TEXT
    found = look(model, tokenizer(), text, top_k=3, **({"target": TEXT} if family == "t5" else {}))
    given = {"decoder_input_ids": torch.tensor([found.target])} if family == "t5" else {}
    with torch.no_grad():
        logits = theirs(family).double()(torch.tensor([found.tokens]), **given).logits[0]
    places = [6] if family == "bert" else range(len(logits))
    assert [d.place for d in found.distributions] == list(places)
    for d in found.distributions:
        wanted, ids = logits[d.place].softmax(-1).topk(3)
        assert d.ids == ids.tolist()
        assert d.probabilities(1.0) == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("count", [10, 100])
def test_patched_models_show_the_last_places(count):
    model = theirs("bloom")
    fasttx.patch(model)
    found = look(model, tokenizer(), long(count), top_k=1)
    with torch.no_grad():
        logits = theirs("bloom").double()(torch.tensor([found.tokens])).logits[0]
    assert [d.place for d in found.distributions] == list(range(max(0, count - 64), count))
    for d in found.distributions:
        assert d.logits[0] == pytest.approx(float(logits[d.place].max()), abs=1e-3)
        assert float(logits[d.place, d.ids[0]]) == pytest.approx(d.logits[0], abs=1e-3)


@pytest.mark.parametrize("kind", ["fasttx", "patched"])
def test_a_model_without_a_language_head_shows_none(kind, tmp_path):
    theirs("bert").bert.save_pretrained(tmp_path)
    tokenizer().save(tmp_path)
    found = look(*fasttx.inspect.load(tmp_path, patched=kind == "patched"), TEXT)
    assert not found.speaks and found.distributions == []
    assert len(found.maps) == 2


def test_half_precision():
    model = theirs("gpt2").bfloat16()
    fasttx.patch(model)
    found = look(model, tokenizer(), TEXT)
    for maps in found.maps:
        torch.testing.assert_close(maps.full.sum(-1), torch.ones(2, 16), rtol=0, atol=5e-3)
    torch.testing.assert_close(found.rollout["decoder"].sum(-1), torch.ones(16), rtol=0, atol=0.03)


def test_a_family_that_fasttx_has_no_model_of_is_patched(tmp_path):
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=tokenizer().vocab_size, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save(tmp_path)
    found = look(*fasttx.inspect.load(tmp_path), TEXT)
    assert found.model == "LlamaForCausalLM" and found.positions.startswith("rotary")
    assert [tuple(m.full.shape) for m in found.maps] == [(4, 16, 16)] * 2
    torch.testing.assert_close(found.maps[1].full.sum(-1), torch.ones(4, 16))
