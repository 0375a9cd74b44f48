"""Residual + LayerNorm or RMSNorm beside PyTorch's separate calls; dropout and bias too."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention_case import DTYPES
from .generic import Work

SEED = 1234
GOALS = {
    ("8192x768", "bf16"): (2.0, 2.7),
    ("8192x768", "fp32"): (1.4, 2.2),
    ("128x768", "bf16"): (1.5, None),
    ("128x768", "fp32"): (1.5, None),
    ("8192x768 dropout 0.1", "bf16"): (3.0, None),
    ("8192x768 dropout 0.1", "fp32"): (3.0, None),
}


def work(rows: int, columns: int, dtype: str, kind: str = "layer", dropout: float = 0.0) -> Work:
    import fasttx
    from fasttx.reference.philox import philox_mask

    case = f"{rows}x{columns}" + (" rms" if kind == "rms" else "")
    case += f" dropout {dropout:g}" if dropout else ""

    def make(device, generator):
        def normal(*size):
            return torch.randn(size, generator=generator, device=device).to(DTYPES[dtype])

        x = {"x": normal(rows, columns), "residual": normal(rows, columns)}
        x |= {name: normal(columns) for name in ("weight", "bias")}
        if dropout:
            x["x_bias"] = normal(columns)
            seed = torch.tensor([SEED], device=device)
            x["keep"] = philox_mask(seed, dropout, 1, 1, rows, columns)[0, 0]
        return x

    def norm(x, total):
        if kind == "rms":
            return F.rms_norm(total, (columns,), x["weight"], 1e-5) + x["bias"]
        return F.layer_norm(total, (columns,), x["weight"], x["bias"])

    def truth(x):
        if not dropout:
            return norm(x, x["x"] + x["residual"])
        dropped = (x["x"] + x["x_bias"]) * x["keep"] / (1 - rate)
        return norm(x, dropped + x["residual"])

    def eager(x):
        if not dropout:
            return norm(x, x["x"] + x["residual"])
        return norm(x, F.dropout(x["x"] + x["x_bias"], dropout) + x["residual"])

    def ours(x, seed=None):
        tensors = {n: t for n, t in x.items() if n != "keep"}
        return fasttx.add_norm(**tensors, dropout_p=dropout, kind=kind, seed=seed)

    rate = int(dropout * 65536 + 0.5) / 65536
    tensor = rows * columns * DTYPES[dtype].itemsize
    goal = GOALS.get((case, dtype))
    return Work(
        op="add_norm", case=case, dtype=dtype, make=make, truth=truth,
        contenders={"eager": eager, "fasttx": ours},
        checks={"eager": None, "fasttx": lambda x: ours(x, SEED)} if dropout else {},
        leaves=("x", "residual", "weight", "bias", *(("x_bias",) if dropout else ())),
        directions=("forward", "step"), moved={"forward": 3 * tensor, "step": 7 * tensor},
        goals={"forward": goal} if goal else {},
        shape={"rows": rows, "columns": columns}, features={"kind": kind, "dropout": dropout},
    )  # fmt: skip


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    shapes = ((8192, 768, 0.0), (128, 768, 0.0), (8192, 768, 0.1))
    return [work(m, n, d, dropout=p) for m, n, p in shapes for d in dtypes]


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return must_cases(dtypes)


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    more = [
        work(m, n, d, k) for m, n, k in ((4096, 4096, "rms"), (1, 768, "layer")) for d in dtypes
    ]
    return quick_cases(dtypes) + more
