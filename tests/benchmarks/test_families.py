"""The rows of the six families and of any Hugging Face folder, on tiny random models."""
# ruff: noqa: E402, E501

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fasttx.benchmarks import options as asked
from fasttx.benchmarks.models import families
from fasttx.benchmarks.rows import Run
from rich.console import Console

CPU = torch.device("cpu")
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TINY = {
    **dict.fromkeys(("bert-base", "bert-encoder", "roberta-base"), _BERT),
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}  # fmt: skip


@pytest.fixture(params=list(families.FAMILIES))
def source(request, monkeypatch):
    known = families.FAMILIES[request.param]
    tiny = families.Family(
        known.head,
        known.config_class,
        {**TINY[request.param], "vocab_size": 90},
        known.batches,
        known.kind,
    )
    monkeypatch.setitem(families.FAMILIES, request.param, tiny)
    return families.family(request.param)


@pytest.mark.parametrize("direction", ["forward", "step"])
def test_a_family_is_measured_and_checked(source, direction):
    run = Run("test", "now", {})
    bench = families.Bench(source, "fp32", CPU, run)
    rows = {r.provider: r for r in bench.measure(1, 0.0, direction=direction, size=(4, 12))}
    assert "sdpa" in rows and ("fasttx" in rows) != bool(run.skipped)
    assert ("fasttx_unpad" in rows) == (source.name not in ("gpt2", "bloom"))
    for row in rows.values():
        assert row.ok, row.why
        assert row.ratio is not None and row.median_s > 0


def test_a_wrong_model_gets_no_ratio(monkeypatch):
    monkeypatch.setattr(families, "patch", _spoil)
    source = families.Source("x", "x", "causal", _gpt2, {"forward": ((2, 8),)})
    bench = families.Bench(source, "fp32", CPU, Run("test", "now", {}))
    rows = {r.provider: r for r in bench.measure(1, 0.0, direction="forward", size=(2, 8))}
    assert rows["fasttx"].ok is False and rows["fasttx"].ratio is None


def _spoil(model, unpad=False):
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1.01)


def _gpt2(dtype):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=90, **TINY["gpt2"])
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def test_a_folder_runs_forward_step_and_generation(tmp_path):
    _gpt2(torch.float32).save_pretrained(tmp_path / "mine")
    source = families.folder(str(tmp_path / "mine"))
    assert source.title == "mine (GPT2LMHeadModel)" and source.kind == "causal"
    bench = families.Bench(source, "fp32", CPU, Run("test", "now", {}))
    rows = bench.measure(1, 0.0, direction="generate", size=(1, 8))
    assert all(r.ok for r in rows) and {r.provider for r in rows} >= {"sdpa"}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", "is no Hugging Face folder"),
        ({"architectures": ["NoSuchModel"]}, "names no architecture that transformers has"),
        ({}, "names no architecture"),
    ],
)
def test_a_folder_that_is_none(tmp_path, config, text):
    text_of = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text_of)
    with pytest.raises(families.NotAModel, match=text):
        families.folder(str(tmp_path))


def test_a_folder_is_a_target(tmp_path):
    with pytest.raises(asked.UsageError, match="has no config"):
        asked.targets(["model", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    assert asked.targets([str(tmp_path)])["models"] == (str(tmp_path),)
    assert asked.Options(**asked.targets([str(tmp_path)])).only_a_folder()
    assert not asked.Options(**asked.targets(["gpt2", str(tmp_path)])).only_a_folder()
    both = asked.targets(["model", "t5", "op", "rope"])
    assert (both["ops"], both["models"]) == (("rope",), ("t5",))


def test_a_folder_that_cannot_be_loaded_is_left_out_in_words(tmp_path):
    from fasttx.benchmarks.session import Session

    (tmp_path / "config.json").write_text("{}")
    options = asked.Options(ops=(), models=(str(tmp_path),), dtypes=("fp32",))
    session = Session(options, Console(quiet=True))
    assert session.plan() == []
    assert "names no architecture" in session.run.skipped[-1]["why"]
