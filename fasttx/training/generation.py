"""Text from text: a prompt in the model's own tokens, and its continuation read back."""

import torch
from torch import nn

from .batches import is_seq2seq
from .tokenizer import Tokenizer, check_tokenizer

__all__ = ["generate_text"]


def generate_text(
    model: nn.Module, tokenizer: Tokenizer, texts: str | list[str], **options
) -> list[str]:
    """What the model writes after each text, or for it if it is a seq2seq model.

    options: of the model's generate (max_new_tokens, do_sample, num_beams, ...), fasttx's or
    transformers'. The texts are one batch, padded on the left.

    Raises:
        TokenizerMismatch: the model was trained with another tokenizer.
        ValueError: no texts, or one of no tokens.
    """
    check_tokenizer(model, tokenizer)
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = [tokenizer.prompt(text) for text in texts]
    if not rows or not all(rows):
        raise ValueError(f"texts must each have a token, got {texts!r}")
    longest = max(map(len, rows))
    device = next(model.parameters()).device
    pad = tokenizer.pad if tokenizer.pad is not None else 0
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    out = model.generate(ids, attention_mask=mask, **options)
    written = out if is_seq2seq(model) else out[:, longest:]
    return [tokenizer.decode(row) for row in written.tolist()]
