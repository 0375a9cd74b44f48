"""Batches as models take them: their counts, their loss, and what cannot be right in them."""

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .objectives import IGNORE

__all__ = ["Rows", "check_batch", "is_seq2seq", "labelled", "loss_of", "tokens",
           "without_dropout"]  # fmt: skip

HEADS = ("fasttx.models.heads", "fasttx.integrations.hf_heads")


class Rows:
    """Examples of any dataset with __len__ and __getitem__; collate makes a batch of a list."""

    def __init__(self, dataset, collate: Callable[[list], Mapping[str, Tensor]] | None = None):
        self.dataset = dataset
        self.collate = collate or torch.utils.data.default_collate

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices, epochs=0) -> Mapping[str, Tensor]:
        return self.collate([self.dataset[int(i)] for i in indices])


def labelled(batch: Mapping) -> int:
    """Positions with a label other than -100; rows where there are no labels."""
    labels = batch.get("labels")
    if labels is None:
        return len(next(v for v in batch.values() if isinstance(v, Tensor) and v.dim()))
    return int((labels != IGNORE).sum()) if not labels.is_floating_point() else len(labels)


def tokens(model: nn.Module, batches: list[dict]) -> tuple[int, int]:
    """Real tokens of the source and, for a seq2seq model, of the target."""
    source = target = 0
    for batch in batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            source += int(mask.sum())
        elif ids is not None:
            source += ids.numel()
        if is_seq2seq(model):
            target += labelled(batch)
    return source, target


def is_seq2seq(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(
        getattr(config, "is_encoder_decoder", False)
        or getattr(config, "topology", None) == "seq2seq"
    )


def loss_of(output) -> Tensor:
    """The scalar loss in what a model returns."""
    loss = output
    if not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            loss = output.get("loss")
        else:
            loss = getattr(output, "loss", None)
            if loss is None and isinstance(output, (tuple, list)) and output:
                loss = output[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"the model's forward gave no scalar loss but {type(output).__name__}; it needs an "
            "output with .loss, or the loss itself"
        )
    return loss.reshape(())


@contextlib.contextmanager
def without_dropout(model: nn.Module):
    """Evaluation mode; but fasttx's heads, whose own mode decides no more than that, make no logits
    with the loss as in training."""
    model.eval()
    model.training = type(model).__module__ in HEADS
    try:
        yield
    finally:
        model.train()


def check_batch(model: nn.Module, batch: Mapping) -> None:
    """Refuse ids and labels that cannot be this model's.

    Raises ValueError naming the tensor, its values or shape and what is allowed.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    ids, labels = batch.get("input_ids"), batch.get("labels")
    positions = batch.get("position_ids")
    if (
        isinstance(positions, Tensor)
        and type(model).__module__.startswith("fasttx.models.")
        and "cu_seq_lens_q" not in batch
        and bool((positions[:, 1:] <= positions[:, :-1]).any())
    ):
        raise ValueError(
            f"{type(model).__name__} of fasttx.models would let the packed documents of a row see "
            'each other: use layout="flat"'
        )
    if isinstance(ids, Tensor) and ids.numel():
        if ids.is_floating_point():
            raise ValueError(f"input_ids must be integers, got {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (isinstance(size, int) and high >= size):
            raise ValueError(
                f"input_ids are from {low} to {high}, and the model's vocabulary has {size}: is "
                "it the model's tokenizer?"
            )
    if not isinstance(labels, Tensor) or not labels.numel() or labels.is_floating_point():
        return
    known, kind = labels[labels != IGNORE], type(model).__name__
    if isinstance(ids, Tensor):
        apart = labels.dim() == 1 or is_seq2seq(model) or "QuestionAnswering" in kind
        rows = ids.shape[:1] if apart else ids.shape
        if labels.shape[: len(rows)] != rows:
            raise ValueError(
                f"labels do not match: {list(labels.shape)} for input_ids {list(ids.shape)}"
            )
    classes = size if "LM" in kind or "Generation" in kind else None
    if "SequenceClassification" in kind or "TokenClassification" in kind:
        classes = getattr(config, "num_labels", 1)
        classes = None if classes == 1 else classes
    if known.numel() and (
        int(known.min()) < 0 or (isinstance(classes, int) and int(known.max()) >= classes)
    ):
        raise ValueError(
            f"labels are from {int(known.min())} to {int(known.max())}, allowed are -100 (none) "
            f"and 0 to {'...' if classes is None else classes - 1}"
        )
