"""The rows of the six families and of any Hugging Face folder, on tiny random models."""
# ruff: noqa: E402, E501

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fasttx.benchmarks import options as asked
from fasttx.benchmarks.models import families
from fasttx.benchmarks.rows import Run
from fasttx.benchmarks.run import main
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
    for nowhere in ("", str(tmp_path / "nowhere")):
        with pytest.raises(asked.UsageError, match="there is no such folder"):
            asked.targets(["model", nowhere])
    (tmp_path / "config.json").write_text("{}")
    assert asked.targets([str(tmp_path)])["models"] == (str(tmp_path),)
    assert asked.Options(**asked.targets([str(tmp_path)])).only_a_folder()
    assert not asked.Options(**asked.targets(["gpt2", str(tmp_path)])).only_a_folder()
    both = asked.targets(["model", "t5", "op", "rope"])
    assert (both["ops"], both["models"]) == (("rope",), ("t5",))


def _save(kind, folder, **config):
    small = {"vocab_size": 90, **TINY["bert-base"], **config}
    torch.manual_seed(0)
    getattr(transformers, kind)(transformers.BertConfig(**small)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "length"),
    [("BertForSequenceClassification", 128), ("BertForQuestionAnswering", 128), ("BertModel", 38)],
)
def test_folders_of_other_heads_and_of_few_positions(kind, length, tmp_path):
    positions = 512 if length == 128 else 40
    path = _save(kind, tmp_path / "mine", max_position_embeddings=positions)
    families.check(path)
    source = families.folder(path)
    assert source.batches["forward"] == ((8, length),)
    bench = families.Bench(source, "fp32", CPU, Run("test", "now", {}))
    for direction in ("forward", "step"):
        rows = bench.measure(1, 0.0, direction=direction, size=(2, 16))
        assert {"fasttx", "sdpa"} <= {row.provider for row in rows}
        assert all(row.ok for row in rows), [row.why for row in rows]


def _without_weights(path):
    (path / "model.safetensors").unlink()


def _with_half_the_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _of_pictures(path):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    transformers.ViTForImageClassification(config).save_pretrained(path)


def _of_an_unknown_architecture(path):
    (path / "config.json").write_text('{"architectures": ["SuperNova"], "model_type": "nova"}')


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_without_weights, "cannot be measured: Error no file named model.safetensors"),
        (_with_half_the_weights, "cannot be measured: "),
        (_of_pictures, "cannot be measured: ViTForImageClassification takes no token ids"),
        (_of_an_unknown_architecture, "names no architecture that transformers has"),
    ],
)
def test_a_folder_that_cannot_be_measured_is_one_line(spoil, text, tmp_path, capsys):
    path = tmp_path / "mine"
    path.mkdir()
    _save("BertModel", path)
    spoil(path)
    assert main(["model", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"fasttx bench: model folder {path}") and text in told


def test_what_fasttx_models_does_not_know_is_told_without_our_own_folders(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    run = Run("test", "now", {})
    families.Bench(str(tmp_path), "fp32", CPU, run)
    (left_out,) = run.skipped
    assert left_out["why"].startswith("config.json: model_type must be one of")


def test_a_folder_that_cannot_be_loaded_is_left_out_in_words(tmp_path):
    from fasttx.benchmarks.session import Session

    (tmp_path / "config.json").write_text("{}")
    options = asked.Options(ops=(), models=(str(tmp_path),), dtypes=("fp32",))
    session = Session(options, Console(quiet=True))
    assert session.plan() == []
    assert "names no architecture" in session.run.skipped[-1]["why"]
    with pytest.raises(asked.UsageError, match=r"nothing to run: .* names no architecture"):
        session.execute()
