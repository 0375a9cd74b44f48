"""Maps, rollout and statistics against transformers' own eager attention in float64, for our models
and for patched ones."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fasttx
from fasttx.inspect import FULL, GRID, look
from tests.inspect.small import FAMILIES, SEQ2SEQ, TEXT, long, ours, theirs, tokenizer

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
TARGET = "the teacher read to the student"


def eager(family: str, found, dtype=torch.float64) -> dict[str, list]:
    """{kind: [H,S,T] of each layer}, of the same tokens."""
    ids, target = found.tokens, found.target
    model = theirs(family).to(dtype)
    model.set_attn_implementation("eager")
    given = {"decoder_input_ids": torch.tensor([target])} if target else {}
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True, return_dict=True, **given)
    if target:
        found = {"encoder": out.encoder_attentions, "decoder": out.decoder_attentions}
        found["cross"] = out.cross_attentions
    else:
        found = {"decoder" if family in ("gpt2", "bloom") else "encoder": out.attentions}
    return {kind: [p[0].double() for p in layers] for kind, layers in found.items()}


def assert_close(actual, wanted, plain) -> None:
    """At most three times as far from float64 as transformers' float32, plus the rounding of an lse
    below 8: a probability of 1 is exp(logit - lse)."""
    allowed = 3 * (plain - wanted).abs().max() + 8 * torch.finfo(torch.float32).eps
    assert float((actual.double() - wanted).abs().max()) <= float(allowed)


def inspected(family: str, own: bool, folder, text: str = TEXT, **options):
    if own:
        model = ours(family, folder)
    else:
        model = theirs(family)
        fasttx.patch(model)
    if family in SEQ2SEQ:
        options.setdefault("target", TARGET)
    return look(model, tokenizer(), text, **options)


def multiplied(layers: list) -> torch.Tensor:
    result = torch.eye(layers[0].shape[-1], dtype=torch.float64)
    for p in layers:
        result = (result + p.mean(0) @ result) / 2
    return result


@pytest.mark.parametrize("own", [True, False], ids=["fasttx", "patched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_and_rollout_are_those_of_softmax(family, own, tmp_path):
    found = inspected(family, own, tmp_path)
    wanted, plain = eager(family, found), eager(family, found, torch.float32)
    assert set(found.kinds) == set(wanted)
    for kind, layers in wanted.items():
        assert len(found.layers(kind)) == len(layers)
        for maps, p, other in zip(found.layers(kind), layers, plain[kind], strict=True):
            assert_close(maps.full, p, other)
            assert p.std() > 0.03  # far from uniform: a wrong map would show
        if kind != "cross":
            assert_close(found.rollout[kind], multiplied(layers), multiplied(plain[kind]))


def test_statistics_are_those_of_the_map(tmp_path):
    found = inspected("bert", True, tmp_path)
    for maps in found.maps:
        p = maps.full.double()
        S = p.shape[-1]
        i, j = torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij")
        for name, wanted in {
            "entropy": -(p * p.clamp_min(1e-300).log()).sum((1, 2)) / S,
            "first": p[..., 0].mean(-1),
            "distance": (p * (i - j).abs()).sum((1, 2)) / S,
            "self": p.diagonal(0, 1, 2).sum(-1) / S,
            "before": p.diagonal(-1, 1, 2).sum(-1) / S,
            "after": p.diagonal(1, 1, 2).sum(-1) / S,
        }.items():
            torch.testing.assert_close(maps.statistics[name], wanted, rtol=1e-9, atol=1e-12)
        assert torch.equal(maps.favourites[:, 0], p.mean(1).argmax(-1))
        torch.testing.assert_close(maps.favourite_shares, p.mean(1).topk(3).values)


@pytest.mark.parametrize("own", [True, False], ids=["fasttx", "patched"])
@pytest.mark.parametrize("family", ["bloom", "t5"])
def test_long_texts_have_grids_and_exact_rows(family, own, tmp_path):
    found = inspected(family, own, tmp_path, long(600), rows=[0, 17, -1])
    wanted, plain = eager(family, found), eager(family, found, torch.float32)
    for kind, layers in wanted.items():
        for maps, p, other in zip(found.layers(kind), layers, plain[kind], strict=True):
            if kind == "decoder" and family == "t5":  # the target is short
                assert_close(maps.full, p, other)
                continue
            assert maps.full is None
            assert_close(maps.pooled, pooled(p), pooled(other))
            assert maps.rows.tolist() == ([0] if kind == "cross" else [0, 17, 599])
            assert_close(maps.exact, p[:, maps.rows], other[:, maps.rows])
            assert torch.equal(maps.probabilities(0), maps.exact[:, 0])
            with pytest.raises(ValueError, match="row must be one of the rows"):
                maps.probabilities(5)
    side = found.kinds[0]
    groups = torch.arange(600) * GRID // 600
    tables = []
    for layers in (wanted[side], plain[side]):
        joined = torch.zeros(600, GRID, dtype=torch.float64)
        tables.append(pooled(joined.index_add_(1, groups, multiplied(layers))[None])[0])
    assert_close(found.rollout[side], *tables)


def pooled(p):
    return torch.nn.functional.adaptive_avg_pool2d(p, GRID)


class Largest(TorchDispatchMode):
    """The most elements any tensor had that was made within."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().size() // t.element_size())
        return result


def test_no_square_matrix_is_made_above_512_tokens(tmp_path):
    assert FULL == 512
    changed = {"n_layer": 1, "n_head": 1, "hidden_size": 8}
    model = ours("bloom", tmp_path, **changed)
    with Largest() as seen:
        found = look(model, tokenizer(), long(4096))
    assert found.maps[0].pooled.shape == (1, GRID, GRID)
    assert seen.numel < 4096 * 4096 / 2


def test_the_model_stays_as_it_was(tmp_path):
    model = ours("gpt2", tmp_path)
    model.train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    look(model, tokenizer(), TEXT)
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.nn.modules.module._global_forward_pre_hooks
