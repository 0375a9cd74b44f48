"""Sampling beside the usual chain of transformers: temperature, top-k, top-p, softmax and
torch.multinomial. Timed with random draws; checked, with a known seed, for the very ids."""

from __future__ import annotations

import torch

from .attention_case import DTYPES
from .generic import Work

SEED = 1234
FILTERS = {
    "": {},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
}


def chain(logits, temperature=1.0, top_k=None, top_p=None):
    """transformers' warpers in their order, then a draw."""
    scores = logits if temperature == 1.0 else logits / temperature
    if top_k:
        least = torch.topk(scores, top_k)[0][..., -1, None]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p:
        ordered, places = torch.sort(scores, descending=False)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        out[..., -1:] = False
        scores = scores.masked_fill(out.scatter(1, places, out), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1)


def work(rows: int, classes: int, dtype: str, filters: str, goal: tuple | None = None) -> Work:
    import fasttx
    from fasttx.reference.sample import sample_math

    options = FILTERS[filters]

    def make(device, generator):
        logits = 2 * torch.randn((rows, classes), generator=generator, device=device)
        return {"logits": logits.to(DTYPES[dtype])}

    def truth(x):
        seed = torch.tensor([SEED], device=x["logits"].device)
        factor = 2**24 * 1.4426950408889634 / options.get("temperature", 1.0)
        filtered = options.get("top_k", 0), options.get("top_p", 1.0)
        logits = x["logits"].to(DTYPES[dtype])
        return sample_math(logits, seed, factor, *filtered, False).to(x["logits"].dtype)

    def ours(x):
        return fasttx.sample(x["logits"], **options)

    def known(x):
        return fasttx.sample(x["logits"], **options, seed=SEED).to(x["logits"].dtype)

    return Work(
        op="sample", case=f"{rows}x{classes} {filters}".strip(), dtype=dtype, make=make,
        truth=truth,
        contenders={"eager": lambda x: chain(x["logits"], **options), "fasttx": ours},
        checks={"eager": None, "fasttx": known}, directions=("forward",),
        moved={"forward": rows * classes * DTYPES[dtype].itemsize},
        goals={"forward": goal} if goal else {},
        shape={"rows": rows, "classes": classes}, features={"filters": filters},
    )  # fmt: skip


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [work(8, 50257, dtype, f, (1.5, None)) for f in FILTERS for dtype in dtypes]


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return must_cases(dtypes)


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return quick_cases(dtypes) + [work(1, 50257, dtype, f) for f in FILTERS for dtype in dtypes]
