"""What a whole model is given, what of its answer is compared, and what is timed.

Ids are random; every other row is half padding; of masked LM 15 % of the positions have labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LABELLED = 0.15
NEW_TOKENS = 32


def make_batch(config, kind: str, size: tuple[int, int], device) -> dict[str, Tensor]:
    """Random ids, every other row half padding on the right, and labels for what has a loss."""
    rows, length = size
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = torch.randint(5, text.vocab_size, size, generator=generator)
    mask = torch.ones(size, dtype=torch.long)
    mask[1::2, length // 2 :] = 0
    pad = text.pad_token_id if text.pad_token_id is not None else 0
    batch = {"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}
    hidden = ~mask.bool()
    if kind == "masked":
        hidden = hidden | (torch.rand(size, generator=generator) >= LABELLED)
    if kind != "hidden":
        batch["labels"] = ids.masked_fill(hidden, -100)
    return {name: t.to(device) for name, t in batch.items()}


def _outputs(model, batch: dict[str, Tensor]) -> Tensor:
    found = model(**batch)
    return next(found[n] for n in ("logits", "last_hidden_state", "start_logits") if n in found)


def visible(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The outputs at visible positions; all of them where a row has one output."""
    mask = batch["attention_mask"].bool()
    return out[mask] if out.shape[: mask.ndim] == mask.shape else out


def _loss(model, batch: dict[str, Tensor]) -> Tensor:
    if "labels" in batch:
        return model(**batch).loss
    return visible(_outputs(model, batch), batch).float().square().mean()


def _gradients(model, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(_loss(model, batch), wanted, allow_unused=True)
    return tuple(g for g in grads if g is not None)


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in batch.items() if n != "labels"}


def given_of(model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels stay where the model needs them to know what its decoder reads."""
    return batch if getattr(model.config, "is_encoder_decoder", False) else _inputs(batch)


def answers(model, batch: dict[str, Tensor], direction: str) -> dict[str, Tensor]:
    """What is compared: outputs at visible positions, for a step all gradients as one vector."""
    model.eval()
    if direction == "generate":
        return {"ids": call(model, batch, direction)()}
    if direction == "forward":
        with torch.no_grad():
            return {"out": visible(_outputs(model, batch), batch)}
    grads = _gradients(model, batch)
    return {"dparameters": torch.cat([g.flatten().double() for g in grads])}


def call(model, batch: dict[str, Tensor], direction: str) -> Callable[[], object]:
    if direction == "forward":
        given = given_of(model, batch)

        def forward():
            model.eval()
            with torch.no_grad():
                return _outputs(model, given)

        return forward
    if direction == "generate":
        given = {n: t[:1] for n, t in _inputs(batch).items()}

        def generate():
            model.eval()
            with torch.no_grad():
                return model.generate(
                    **given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
                )

        return generate

    def step():
        model.train()
        return _gradients(model, batch)

    return step
