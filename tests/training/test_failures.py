"""What is refused before work starts, and what stops it: in words, the last checkpoint whole."""

import json
import resource
import shutil

import pytest
import torch

from fasttx.training import ConfigError, Rows, TrainingError, TrainOptions, fit
from fasttx.training.checkpoint import checkpoints, load_tensors
from fasttx.training.tokenizer import remember_tokenizer

from . import corpus, tiny, toy
from .test_loop import Linear64, files, rows64


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.tokenizer("word")


class Sick(toy.Toy):
    """The loss of the call-th forward is not a number, or its gradient."""

    def __init__(self, *args, call: int, gradient: bool = False, **options):
        super().__init__(*args, **options)
        self.call, self.gradient = call, gradient

    def forward(self, **batch):
        self.call -= 1
        loss = super().forward(**batch)["loss"]
        if self.call:
            return loss
        return loss + (self.head.weight - self.head.weight).abs().sum().sqrt() if self.gradient \
            else loss * torch.nan  # fmt: skip


@pytest.mark.parametrize("gradient", [False, True])
def test_a_value_that_is_not_finite_stops_before_it_spoils_the_weights(
    gradient, tokenizer, tmp_path
):
    torch.manual_seed(3)
    model = Sick(tokenizer.vocab_size, call=8, gradient=gradient)
    what = "the norm of the gradients is nan" if gradient else "the loss is nan"
    with pytest.raises(TrainingError, match=rf"step 8: {what}.*checkpoint is .*step-00000006"):
        fit(model, toy.examples(tokenizer), tmp_path, steps=20, batch_size=8, save_every=3)
    assert all(p.isfinite().all() for p in model.parameters())
    kept = checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in kept] == ["step-00000003", "step-00000006"]
    result = fit(toy.model(tokenizer), toy.examples(tokenizer), tmp_path, steps=20, batch_size=8,
                 save_every=3, resume=True)  # fmt: skip
    assert result.steps == 20


class Full:
    """Examples at whose call-th batch the disk is full: no file may grow beyond a few bytes."""

    def __init__(self, examples, call: int):
        self.examples, self.call = examples, call
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __len__(self):
        return len(self.examples)

    def batch(self, indices, epochs=0):
        self.call -= 1
        if self.call == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, self.before[1]))
        return self.examples.batch(indices, epochs)


def test_a_full_disk_stops_with_the_last_checkpoint_whole(tokenizer, tmp_path):
    data = toy.examples(tokenizer)
    examples = Full(data, 7)
    try:
        with pytest.raises(TrainingError, match=r"cannot be written: .*step-00000004"):
            fit(toy.model(tokenizer), examples, tmp_path / "a", steps=8, batch_size=8,
                save_every=4)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, examples.before)
    saves = tmp_path / "a/checkpoints"
    assert [p.name for p in saves.iterdir()] == ["step-00000004"]
    fit(toy.model(tokenizer), data, tmp_path / "a", steps=8, batch_size=8, save_every=4,
        resume=True)  # fmt: skip
    fit(toy.model(tokenizer), data, tmp_path / "b", steps=8, batch_size=8, save_every=4)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_log_that_cannot_be_written_stops(tmp_path):
    class Linked(Rows):
        def batch(self, indices, epochs=0):
            if (path := tmp_path / "log.jsonl").exists():
                path.unlink()
                path.symlink_to("/dev/full")
            return super().batch(indices, epochs)

    with pytest.raises(TrainingError, match=r"log\.jsonl cannot be written: .*No space"):
        fit(Linear64(), Linked(rows64().dataset), tmp_path, steps=2, batch_size=8, log_every=1)


def train(folder, tokenizer, **changed):
    given = {"steps": 4, "batch_size": 8} | changed
    return fit(toy.model(tokenizer), toy.examples(tokenizer), folder, **given)


def test_a_folder_with_a_run_is_not_overwritten(tokenizer, tmp_path):
    train(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"holds a run .*step-00000004.*resume"):
        train(tmp_path, tokenizer)


def test_a_folder_that_is_trained_into_is_not_shared(tokenizer, tmp_path):
    class Twice(Rows):
        def batch(self, indices, epochs=0):
            if (tmp_path / "checkpoints").exists():
                with pytest.raises(ValueError, match="another process trains into"):
                    fit(Linear64(), rows64(), tmp_path, resume=True, **given)
            return super().batch(indices, epochs)

    given = {"steps": 3, "batch_size": 8, "save_every": 1}
    assert fit(Linear64(), Twice(rows64().dataset), tmp_path, **given).steps == 3


def test_another_tokenizer_than_the_models_is_refused(tokenizer, tmp_path):
    model = tiny.model("bert", tokenizer)
    remember_tokenizer(model, corpus.tokenizer("word", 50))
    with pytest.raises(ValueError, match="was trained with the tokenizer"):
        fit(model, toy.examples(tokenizer), tmp_path, steps=1, batch_size=8, tokenizer=tokenizer)


def test_a_checkpoint_of_another_config_is_refused(tokenizer, tmp_path):
    train(tmp_path, tokenizer)
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="from another config") as caught:
        train(tmp_path, tokenizer, learning_rate=5e-3, clip=2.0, resume=True)
    assert caught.value.problems == [
        "clip: 1.0 there, 2.0 here", "learning_rate: 0.001 there, 0.005 here"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="tokenizer: None there, sha256"):
        fit(toy.model(tokenizer), toy.examples(tokenizer), tmp_path, steps=4, batch_size=8,
            tokenizer=tokenizer, resume=True)  # fmt: skip
    with pytest.raises(ValueError, match=r"another model: .*is \[104, 16\] and \[104, 8\]"):
        fit(toy.model(tokenizer, width=8), toy.examples(tokenizer), tmp_path, steps=4,
            batch_size=8, resume=True)  # fmt: skip
    with pytest.raises(ValueError, match="is not in the model"):
        fit(toy.model(tokenizer, layers=1), toy.examples(tokenizer), tmp_path, steps=4,
            batch_size=8, resume=True)  # fmt: skip
    assert files(tmp_path) == before
    train(tmp_path, tokenizer, keep=5, log_every=3, resume=True)  # these may change


def test_a_damaged_checkpoint_is_named(tokenizer, tmp_path):
    train(tmp_path / "whole", tokenizer, save_every=2)

    def damaged(name, content):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        path = checkpoints(tmp_path / "run/checkpoints")[-1] / name
        path.write_bytes(content(path.read_bytes()))
        return path

    for name, content, message in (
        ("state.json", lambda b: b[:50], "state.json is damaged"),
        ("state.json", lambda b: b"[]", "state.json is damaged"),
        ("optimizer.safetensors", lambda b: b[:-1], r"has \d+ bytes instead of \d+ bytes; remove"),
        ("model.safetensors", lambda b: b"\xff" * len(b), "is damaged"),
    ):
        path = damaged(name, content)
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", tokenizer, save_every=2, resume=True)
    path.parent.joinpath("random.safetensors").unlink()
    with pytest.raises(ValueError, match=r"random\.safetensors is missing"):
        train(tmp_path / "run", tokenizer, save_every=2, resume=True)
    shutil.rmtree(path.parent)  # as the message says: then the one before it serves
    train(tmp_path / "run", tokenizer, save_every=2, resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_corpus_smaller_than_a_batch_is_refused(tokenizer, tmp_path):
    examples = toy.examples(tokenizer, 3)
    with pytest.raises(ValueError, match=rf"has {len(examples)} rows, fewer than one batch of 64"):
        fit(toy.model(tokenizer), examples, tmp_path / "run", steps=4, batch_size=64)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels do not match: \[1\] for|\[2, 3\]"),
        ({"labels": torch.full((9,), 500)}, "labels are from 500 to 500, allowed are -100"),
        ({"labels": torch.full((9,), -3)}, "labels are from -3 to -3"),
        ({"input_ids": torch.full((9,), 500)}, r"input_ids are from 500 to 500, .* vocabulary"),
        ({"input_ids": torch.ones(9)}, "input_ids must be integers"),
    ],
)
def test_labels_and_ids_that_do_not_match(change, message, tokenizer, tmp_path):
    ids = torch.arange(9)
    good = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model = tiny.model("bert", tokenizer)
    with pytest.raises(ValueError, match=message):
        fit(model, Rows([good | change] * 4), tmp_path / "run", steps=2, batch_size=2)
    assert not (tmp_path / "run").exists()


def test_class_labels_are_held_to_the_number_of_classes(tokenizer, tmp_path):
    import transformers

    config = tiny.model("bert", tokenizer).config
    config.num_labels = 3
    model = transformers.BertForSequenceClassification(config)
    ids = torch.arange(9)
    rows = Rows([{"input_ids": ids, "labels": torch.tensor(i)} for i in range(4)])
    with pytest.raises(ValueError, match=r"labels are from 0 to 3, .* 0 to 2"):
        fit(model, rows, tmp_path, steps=1, batch_size=2)


def test_all_wrong_options_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainOptions(batch_size=9, micro_batch_size=4, learning_rate=-1.0, clip=0.0, warmup=-2,
                     betas=(0.9, 1.0), device="tpu", patience=0, evaluate_every=1)  # fmt: skip
    assert len(caught.value.problems) == 8
    with pytest.raises(ConfigError, match="steps or epochs must be given"):
        TrainOptions(steps=3, epochs=2.0)
    with pytest.raises(ConfigError) as caught:
        TrainOptions(steps=2.5, schedule="stairs", precision=16, gradient_checkpointing=1)
    assert len(caught.value.problems) == 4
    with pytest.raises(TypeError, match="unknown batchsize, step"):
        fit(Linear64(), rows64(), "x", step=3, batchsize=4)


def test_what_else_fit_refuses(tmp_path):
    with pytest.raises(ValueError, match="patience needs evaluate_every"):
        fit(Linear64(), rows64(), tmp_path, steps=1, batch_size=8, patience=1)
    with pytest.raises(ValueError, match="patience needs evaluation"):
        fit(Linear64(), rows64(), tmp_path, steps=1, batch_size=8, patience=1, evaluate_every=1)
    with pytest.raises(ValueError, match="evaluation has no rows"):
        fit(Linear64(), rows64(), tmp_path, steps=1, batch_size=8, evaluation=Rows([]))
    model = Linear64()
    model.forward = lambda x, labels: torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="gave no scalar loss but Linear"):
        fit(model, rows64(), tmp_path / "a", steps=1, batch_size=8)
    with pytest.raises(ValueError, match="gradient_checkpointing: Linear64 has neither"):
        fit(Linear64(), rows64(), tmp_path / "b", steps=1, batch_size=8,
            gradient_checkpointing=True)  # fmt: skip
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        fit(Linear64().requires_grad_(False), rows64(), tmp_path / "c", steps=1, batch_size=8)
    rows = Rows([{"x": torch.randn(3, 5, dtype=torch.float64),
                  "labels": torch.full((3,), -100)}] * 8)  # fmt: skip
    with pytest.raises(TrainingError, match="no labelled position"):
        fit(Linear64(), rows, tmp_path / "d", steps=1, batch_size=8)


def test_state_holds_no_pickle(tokenizer, tmp_path):
    train(tmp_path, tokenizer)
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    assert {p.suffix for p in newest.iterdir()} == {".safetensors", ".json"}
    assert json.loads((newest / "state.json").read_text())["step"] == 4
    assert set(load_tensors(newest / "random.safetensors")) == {
        "0.torch", "0.python", "0.numpy"
    }  # fmt: skip
