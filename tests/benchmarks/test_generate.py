"""The rows of generation, on tiny random models."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from fasttx.benchmarks import providers
from fasttx.benchmarks.models import generate
from fasttx.benchmarks.rows import Run

TINY = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1,
                      "eos_token_id": 1},
    "t5-small": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 1,
                          "decoder_start_token_id": 0},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "bart-base": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
                  "decoder_ffn_dim": 64, "encoder_attention_heads": 2,
                  "decoder_attention_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(generate.MODELS))
def test_a_model_is_measured_and_checked(name, dtype, monkeypatch):
    head, config, _ = generate.MODELS[name]
    monkeypatch.setitem(generate.MODELS, name, (head, config, TINY[name] | {"vocab_size": 90}))
    bench = generate.Bench(name, dtype, torch.device("cpu"), Run("test", "now", {}))
    rows = {row.provider: row for row in bench.measure(1, 0.0, batch=2)}
    assert list(rows) == ["fasttx", "dynamic", "static"]
    for row in rows.values():
        assert row.ok, row.why
        assert row.ratio is not None and row.median_s > 0 and row.moved > 0
        assert any("ms a token" in note for note in row.notes)


def test_a_wrong_model_gets_no_ratio(monkeypatch):
    name = "gpt2"
    head, config, _ = generate.MODELS[name]
    monkeypatch.setitem(generate.MODELS, name, (head, config, TINY[name] | {"vocab_size": 90}))
    bench = generate.Bench(name, "fp32", torch.device("cpu"), Run("test", "now", {}))
    with torch.no_grad():
        bench.ours.transformer.stack.norm.bias.add_(0.1)
    rows = {row.provider: row for row in bench.measure(1, 0.0, batch=1)}
    assert rows["fasttx"].ok is False and rows["fasttx"].ratio is None


@pytest.mark.slow
@pytest.mark.parametrize("name", list(generate.MODELS))
def test_ctranslate2(name, monkeypatch):
    """It makes as many tokens, in a process of its own; without quantization it passes the check,
    where it has the dtype."""
    peers = {n: p for n, p in providers.find().items() if n.startswith("ctranslate2")}
    for peer in peers.values():
        if why := peer.reason():
            pytest.skip(why)
    head, config, _ = generate.MODELS[name]
    monkeypatch.setitem(generate.MODELS, name, (head, config, TINY[name] | {"vocab_size": 90}))
    run = Run("test", "now", {})
    bench = generate.Bench(name, "fp32", torch.device("cpu"), run, peers)
    rows = {row.provider: row for row in bench.measure(1, 0.0, batch=2)}
    assert not run.skipped
    assert rows["ctranslate2"].ok, rows["ctranslate2"].why
    assert rows["ctranslate2_int8"].ok is False
    assert "in a process of its own" in rows["ctranslate2"].notes[0]
