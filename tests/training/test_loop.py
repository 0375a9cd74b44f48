"""The loop: what a step is, what is logged, how it ends, how it goes on."""

import json
import math
import signal

import pytest
import torch
from torch import nn

from fasttx.training import Rows, TrainOptions, fit
from fasttx.training.checkpoint import checkpoints
from fasttx.training.optimizer import learning_rate

from . import corpus, toy


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.tokenizer("word")


class Linear64(nn.Module):
    """Mean squared error of a linear map over labelled rows, in float64."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(5, 1, dtype=torch.float64)

    def forward(self, x, labels):
        chosen = labels != -100
        return ((self.map(x)[..., 0] - labels)[chosen] ** 2).mean()


def rows64(count: int = 24):
    draw = torch.Generator().manual_seed(0)
    data = []
    for i in range(count):
        labels = torch.randint(0, 9, (7,), generator=draw)
        labels[torch.rand(7, generator=draw) < i / count] = -100
        data.append({"x": torch.randn(7, 5, generator=draw, dtype=torch.float64),
                     "labels": labels})  # fmt: skip
    return Rows(data)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_are_one_batch(micro, tmp_path):
    """However unevenly the labels fall; also where an epoch ends within a batch."""
    found = []
    for size in (8, micro):
        torch.manual_seed(0)
        model = Linear64()
        fit(model, rows64(20), tmp_path / str(size), steps=6, batch_size=8, micro_batch_size=size)
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], atol=1e-13, rtol=1e-13)


def test_a_step_is_adamw_on_the_clipped_gradient(tmp_path):
    torch.manual_seed(0)
    model, expected = Linear64(), Linear64()
    expected.load_state_dict(model.state_dict())
    data = rows64(8)
    fit(model, data, tmp_path, steps=3, batch_size=8, learning_rate=0.1, clip=0.5, warmup=0,
        schedule="linear", weight_decay=0.3)  # fmt: skip
    groups = [{"params": [expected.map.weight], "weight_decay": 0.3},
              {"params": [expected.map.bias], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6)
    for step in range(3):
        expected(**data.batch(range(8))).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(model), weights(expected), atol=1e-9, rtol=1e-9)


def test_learning_rate_warms_up_and_falls():
    def at(step, **options):
        given = {"steps": 100, "learning_rate": 2.0} | options
        return learning_rate(TrainOptions(**given), step, 100)

    assert [at(s, warmup=4) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert at(9, warmup=0.1) == at(10, warmup=0.1) == 2.0
    assert at(55, warmup=10, schedule="linear", final_learning_rate=1) == pytest.approx(1.5)
    assert at(55, warmup=10, schedule="cosine") == pytest.approx(1.0)
    assert at(32, warmup=10) == pytest.approx(1 + math.cos(math.pi * 22 / 90))
    assert at(99, warmup=10, schedule="constant") == 2.0
    assert at(99) < 0.01


def log(folder) -> list[dict]:
    """Without what is of the clock."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    clock = {"seconds", "tokens_per_second", "share"}
    return [{k: v for k, v in e.items() if k not in clock} for e in entries]


def files(folder) -> dict[str, bytes]:
    newest = checkpoints(folder / "checkpoints")[-1]
    return {p.name: p.read_bytes() for p in newest.iterdir()}


class Stopping:
    """Examples that raise a signal at the call-th batch."""

    def __init__(self, examples, call: int, number=signal.SIGINT):
        self.examples, self.call, self.number = examples, call, number

    def __len__(self):
        return len(self.examples)

    def batch(self, indices, epochs=0):
        self.call -= 1
        if self.call == 0:
            signal.raise_signal(self.number)
        return self.examples.batch(indices, epochs)


OPTIONS = {"steps": 12, "batch_size": 8, "micro_batch_size": 4, "log_every": 5, "save_every": 4,
           "evaluate_every": 3, "learning_rate": 3e-3}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on_bit_for_bit(number, tokenizer, tmp_path):
    data, held = toy.examples(tokenizer), toy.examples(tokenizer, 9, seed=1)
    given = {"evaluation": held, "tokenizer": tokenizer, **OPTIONS}
    whole = fit(toy.model(tokenizer), data, tmp_path / "whole", **given)
    assert (whole.steps, whole.stopped) == (12, None)
    stopped = fit(toy.model(tokenizer), Stopping(data, 12, number), tmp_path / "two", **given)
    assert (stopped.steps, stopped.stopped) == (6, signal.Signals(number).name)
    assert not (tmp_path / "two/model").exists()
    handler = signal.getsignal(number)
    model = toy.model(tokenizer)
    with torch.no_grad():
        model.head.weight.zero_()  # what a new process starts from does not matter
    torch.manual_seed(99)
    again = fit(model, data, tmp_path / "two", resume=True, **given)
    assert again.steps == 12 and again.loss == whole.loss
    assert again.evaluation_loss == whole.evaluation_loss
    assert files(tmp_path / "two") == files(tmp_path / "whole")
    assert log(tmp_path / "two") == log(tmp_path / "whole")
    assert signal.getsignal(number) is handler and model.training


def test_training_learns_and_keeps_what_it_should(tokenizer, tmp_path, capfd, plots):
    data, held = toy.examples(tokenizer, 200), toy.examples(tokenizer, 20, seed=1)
    options = OPTIONS | {"steps": 60, "keep": 2, "learning_rate": 1e-2}
    result = fit(toy.model(tokenizer), data, tmp_path, evaluation=held, tokenizer=tokenizer,
                 progress=True, **options)  # fmt: skip
    first = next(e["loss"] for e in log(tmp_path) if "loss" in e)
    assert result.loss < 0.8 * first and result.evaluation_loss < 0.8 * first
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [
        "step-00000056", "step-00000060"
    ]  # fmt: skip
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {"model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "model").iterdir()
    }
    assert [e["step"] for e in log(tmp_path) if "loss" in e] == list(range(5, 61, 5))
    shown = capfd.readouterr().err
    assert "tokens/s" in shown and "of the matmul limit" in shown and "step 60/60" in shown
    # A finished run that is resumed is finished.
    again = fit(toy.model(tokenizer), data, tmp_path, evaluation=held, tokenizer=tokenizer,
                resume=True, **options)  # fmt: skip
    assert (again.steps, again.loss) == (result.steps, result.loss)


def test_patience_stops_and_keeps_the_best(tokenizer, tmp_path):
    """A rate far too high spoils the model after its first steps."""
    data, held = toy.examples(tokenizer, 60), toy.examples(tokenizer, 20, seed=1)
    model = toy.model(tokenizer, dropout=0.0)
    options = {"steps": 400, "batch_size": 8, "keep": 1, "learning_rate": 1.0, "warmup": 200,
               "evaluate_every": 5, "patience": 3, "clip": None}  # fmt: skip
    result = fit(model, data, tmp_path, evaluation=held, **options)
    assert result.stopped == "patience" and result.steps == result.best_step + 15 < 400
    kept = [p.name for p in checkpoints(tmp_path / "checkpoints")]
    assert kept == [f"step-{s:08d}" for s in (result.best_step, result.steps)]
    losses = {e["step"]: e["evaluation_loss"] for e in log(tmp_path) if "evaluation_loss" in e}
    assert losses[result.best_step] == min(losses.values()) == result.best_loss
    from safetensors.torch import load_file

    best = load_file(tmp_path / "checkpoints" / kept[0] / "model.safetensors")
    saved = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(best[k], saved[k]) for k in best)
    again = fit(toy.model(tokenizer), data, tmp_path, evaluation=held, resume=True, **options)
    assert (again.stopped, again.steps) == ("patience", result.steps)


def test_layers_computed_again_give_the_same_gradients(tokenizer, tmp_path):
    found, calls = [], []
    for again in (False, True):
        model, count = toy.model(tokenizer), [0]
        layer = model.stack.layers[0].feed_forward
        layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        fit(model, toy.examples(tokenizer), tmp_path / str(again), steps=2, batch_size=8,
            gradient_checkpointing=again)  # fmt: skip
        found.append(weights(model))
        calls.append(count[0])
        assert "forward" not in vars(model.stack.layers[0])
    assert torch.equal(*found) and calls == [2, 4]


def test_bf16_is_autocast(tokenizer, tmp_path):
    model, seen = toy.model(tokenizer), set()
    model.stack.layers[0].feed_forward.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    fit(model, toy.examples(tokenizer), tmp_path, steps=2, batch_size=8, precision="bf16",
        evaluation=toy.examples(tokenizer, 9))  # fmt: skip
    assert seen == {torch.bfloat16} and weights(model).dtype is torch.float32


@pytest.mark.parametrize("form", [lambda loss: loss, lambda loss: (loss, None),
                                  lambda loss: {"loss": loss}])  # fmt: skip
def test_any_module_with_a_loss_trains(form, tmp_path):
    class Any(Linear64):
        def forward(self, x, labels):
            return form(super().forward(x, labels))

    result = fit(Any(), rows64(), tmp_path, epochs=2, batch_size=8)
    assert result.steps == 6 and math.isfinite(result.loss)


def test_flops_are_those_of_the_matrices(tokenizer):
    """Of GPT-2: four maps of the layer for every token, the tied table for labelled ones."""
    from fasttx.training.monitor import training_flops

    from . import tiny

    gpt2 = tiny.model("gpt2", tokenizer)
    layer, table = 12 * 32 * 32, tokenizer.vocab_size * 32
    assert training_flops(gpt2, 100, 0, 90) == 6 * (2 * layer * 100 + table * 90)
    bert = tiny.model("bert", tokenizer)
    layer = 4 * 32 * 32 + 2 * 32 * 64
    expected = 6 * (2 * layer * 100 + 32 * 32 * 100 + table * 15)
    assert training_flops(bert, 100, 0, 15) == expected
