"""One layer of each family and training steps, on tiny models: every provider is checked."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from fasttx.benchmarks.models import families, layers, train
from fasttx.benchmarks.rows import Run

CPU = torch.device("cpu")
TINY = {
    "bert-base": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "roberta-base": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_head": 2},
    "bloom": {"hidden_size": 32, "n_head": 2},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2},
    "bart": {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}  # fmt: skip
TORCH_NN = {"torch_nn", "fasttx_torch_nn"}


@pytest.fixture
def tiny(monkeypatch):
    for name, tiny in TINY.items():
        known = families.FAMILIES[name]
        config = {**known.config, **tiny}
        small = families.Family(known.head, known.config_class, config, known.batches, known.kind)
        monkeypatch.setitem(families.FAMILIES, name, small)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", layers.LAYERS)
def test_a_layer_is_measured_beside_everyone(tiny, name, dtype):
    run = Run("test", "now", {})
    bench = layers.Bench(name, dtype, (2, 12), CPU, run)
    expected = {"fasttx", "fasttx_nn", "sdpa"}
    expected |= TORCH_NN if layers.LAYERS[name].torch_nn is None else set()
    for direction in layers.DIRECTIONS:
        rows = bench.measure(1, 0.0, direction=direction)
        assert {row.provider for row in rows} == expected
        for row in rows:
            assert row.ok, (row.provider, row.why)
            assert row.kind == "layer" and row.tokens == 24 and row.tokens_per_s > 0
    assert bool(run.skipped) == (layers.LAYERS[name].torch_nn is not None)


def test_a_wrong_layer_gets_no_ratio(tiny):
    bench = layers.Bench("bert", "fp32", (2, 8), CPU, Run("test", "now", {}))
    with torch.no_grad():
        bench.layers["fasttx_nn"][0].norm1.weight.mul_(1.01)
    rows = {row.provider: row for row in bench.measure(1, 0.0, direction="forward")}
    assert rows["fasttx_nn"].ok is False and rows["fasttx_nn"].ratio is None
    assert rows["fasttx"].ok and rows["fasttx"].best_other in {"sdpa", "torch_nn"}


def _small(monkeypatch, name: str) -> None:
    toy = train.TOYS[name]
    target = toy.target and (2, 6)
    small = train.Toy(toy.family, toy.config, 3, (4, 9), target)
    monkeypatch.setitem(train.TOYS, name, small)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", train.TOYS)
def test_training_steps_are_measured_and_checked(monkeypatch, name, dtype):
    _small(monkeypatch, name)
    bench = train.Bench(name, dtype, CPU, Run("test", "now", {}))
    rows = bench.measure(1, 0.0, size=bench.job.sizes[0])
    assert [row.provider for row in rows] == ["fasttx", "fasttx_models", "sdpa"]
    for row in rows:
        assert row.ok, (row.provider, row.why)
        assert row.ratio > 0 and row.tokens_per_s > 0 and row.flops > 0


def test_torch_compile_meets_its_model_under_no_mode(monkeypatch):
    """Under a dispatch mode, as FLOPs are counted, it would give up compiling and say nothing."""
    _small(monkeypatch, "toy-t5")
    modes = []

    def compiled(model, dynamic):
        model.register_forward_pre_hook(
            lambda *_: modes.append(torch._C._len_torch_dispatch_stack())
        )
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    run = Run("test", "now", {})
    bench = train.Bench("toy-t5", "fp32", CPU, run, beside={"torch_compile": None})
    _, contenders = bench.contest(1, size=bench.job.sizes[0])
    assert contenders["torch_compile"].verdict.ok and contenders["torch_compile"].prepared_s > 0
    assert modes == [0]


def test_wrong_gradients_are_seen(monkeypatch):
    _small(monkeypatch, "toy-gpt2")
    bench = train.Bench("toy-gpt2", "fp32", CPU, Run("test", "now", {}))
    weight = bench.models["fasttx_models"].transformer.stack.layers[0].norm1.weight
    weight.register_hook(lambda gradient: 2 * gradient)
    rows = {row.provider: row for row in bench.measure(1, 0.0, size=bench.job.sizes[0])}
    assert rows["fasttx_models"].ok is False and rows["fasttx_models"].ratio is None


def test_a_step_is_that_of_fit(monkeypatch, tmp_path):
    """Three steps on one batch give the losses that fasttx.training.fit logs."""
    import json

    from fasttx.training import Rows, fit

    _small(monkeypatch, "toy-gpt2")
    work = train.job("toy-gpt2")
    model = work.make()
    batch = work.batch(model, work.sizes[0])
    rows = [{n: t[i] for n, t in batch.items()} for i in range(3)]
    monkeypatch.setattr(train, "LEARNING_RATE", 1e-3)
    step = train.training_step(model, batch, "fp32")
    losses = [step() for _ in range(3)]
    fit(
        work.make(), Rows(rows), tmp_path / "run", steps=3, batch_size=3, learning_rate=1e-3,
        schedule="constant", warmup=0, log_every=1, device="cpu",
    )  # fmt: skip
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    told = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(told, rel=1e-5)
    assert losses[2] < losses[0]
