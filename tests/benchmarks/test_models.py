"""The BERT rows on a tiny random model: three attentions of one model, checked against fp64."""

import pytest
import torch

pytest.importorskip("transformers")

from fasttx.benchmarks.models import bert, weights
from fasttx.benchmarks.rows import Run

CPU = torch.device("cpu")


@pytest.fixture
def source(monkeypatch):
    def unavailable(**options):
        raise weights.Unavailable("no network")

    tiny = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 100,
    }  # fmt: skip
    monkeypatch.setattr(weights, "minilm", unavailable)
    monkeypatch.setattr(bert, "RANDOM", tiny)
    monkeypatch.setattr(bert, "RANDOM_BATCHES", {"3 x 16 ids": (3, 16)})
    return bert.load(CPU)


def test_without_the_package_a_random_bert_is_used_and_it_says_so(source):
    assert source.title == "random BERT"
    assert source.notes == ["random weights and token ids, because no network"]


@pytest.mark.parametrize("direction", ["forward", "step"])
def test_patched_and_unpatched_rows_are_checked(source, direction):
    run = Run("test", "now", {})
    bench = bert.Bench("fp32", CPU, run, source=source)
    rows = {row.provider: row for row in bench.measure(1, 0.0, batch=0, direction=direction)}
    assert set(rows) == {"fasttx", "fasttx_unpad", "sdpa", "eager"}
    assert bench.models["fasttx"].config._attn_implementation == "fasttx"
    for row in rows.values():
        assert row.ok, row.why
        assert row.ratio is not None
        assert "no network" in row.notes[0]
    names = {"out"} | ({"dparameters"} if direction == "step" else set())
    assert set(rows["fasttx"].errors) == names
    assert 0 < rows["fasttx"].features["padding"] < 1


def test_three_copies_of_one_attention_are_refused(source):
    def always_eager(dtype, attention):
        return bert.load(CPU).make(dtype, "eager")

    source.make = always_eager
    with pytest.raises(RuntimeError, match="nothing to compare"):
        bert.Bench("fp32", CPU, Run("test", "now", {}), source=source)
