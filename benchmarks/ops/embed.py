"""Token + position + segment rows, LayerNorm and dropout beside PyTorch's separate calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention_case import DTYPES
from .generic import Work

SEED = 1234
SHAPES = {"16x512": (16, 512), "8x128": (8, 128)}


def work(batch: int, length: int, dtype: str, dropout: float = 0.0, vocabulary: int = 30522,
         columns: int = 768, goal: tuple | None = None) -> Work:  # fmt: skip
    import fasttx
    from fasttx.reference.philox import philox_mask

    case = f"{batch}x{length}x{columns}" + (f" dropout {dropout:g}" if dropout else "")
    leaves = ("token", "position", "segment", "weight", "bias")

    def make(device, generator):
        def normal(*size):
            return torch.randn(size, generator=generator, device=device).to(DTYPES[dtype])

        def ids(high):
            return torch.randint(0, high, (batch, length), generator=generator, device=device)

        x = {"token": normal(vocabulary, columns), "position": normal(length, columns)}
        x |= {"segment": normal(2, columns), "weight": normal(columns), "bias": normal(columns)}
        x |= {"ids": ids(vocabulary), "segments": ids(2)}
        if dropout:
            seed = torch.tensor([SEED], device=device)
            keep = philox_mask(seed, dropout, 1, 1, batch * length, columns)
            x["keep"] = keep.view(batch, length, columns)
        return x

    def norm(x):
        total = F.embedding(x["ids"], x["token"], 0) + F.embedding(x["segments"], x["segment"])
        total = total + x["position"]
        return F.layer_norm(total, (columns,), x["weight"], x["bias"], 1e-12)

    def truth(x):
        return norm(x) * x["keep"] / (1 - rate) if dropout else norm(x)

    def eager(x):
        return F.dropout(norm(x), dropout) if dropout else norm(x)

    def ours(x, seed=None):
        return fasttx.embed(
            x["ids"], x["token"], x["position"], x["segments"], x["segment"], padding_idx=0,
            norm_weight=x["weight"], norm_bias=x["bias"], eps=1e-12, dropout_p=dropout, seed=seed,
        )  # fmt: skip

    rate = int(dropout * 65536 + 0.5) / 65536
    tensor = batch * length * columns * DTYPES[dtype].itemsize
    return Work(
        op="embed", case=case, dtype=dtype, make=make, truth=truth,
        contenders={"eager": eager, "fasttx": ours},
        checks={"eager": None, "fasttx": lambda x: ours(x, SEED)} if dropout else {},
        leaves=leaves, directions=("forward", "step"), moved={"forward": 2 * tensor},
        goals={"forward": goal, "step": goal} if goal else {},
        shape={"batch": batch, "length": length, "columns": columns, "vocabulary": vocabulary},
        features={"dropout": dropout},
    )  # fmt: skip


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    goal = (1.5, None)
    return [
        work(*shape, dtype, dropout, goal=goal)
        for shape in SHAPES.values()
        for dropout in (0.0, 0.1)
        for dtype in dtypes
    ]


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return must_cases(dtypes)


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return quick_cases(dtypes) + [work(1, 1, dtype) for dtype in dtypes]
