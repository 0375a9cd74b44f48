"""act(x W^T + bias) + residual beside PyTorch's separate calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention_case import DTYPES
from .generic import Work


def work(
    rows: int,
    inner: int,
    columns: int,
    dtype: str,
    activation: str | None = None,
    residual: bool = False,
    transposed: bool = False,
) -> Work:
    import fasttx

    case = f"{rows}x{inner}x{columns}" + (f" {activation}" if activation else "")
    case += " residual" * residual + " transposed weight" * transposed
    plain = {None: lambda t: t, "gelu": F.gelu, "silu": F.silu, "relu": F.relu}[activation]

    def make(device, generator):
        def normal(*size):
            return torch.randn(size, generator=generator, device=device).to(DTYPES[dtype])

        weight = normal(columns, inner) * inner**-0.5
        x = {"x": normal(rows, inner), "bias": normal(columns)}
        x["weight"] = weight.t().contiguous().t() if transposed else weight
        return x | ({"residual": normal(rows, columns)} if residual else {})

    def eager(x):
        out = plain(F.linear(x["x"], x["weight"], x["bias"]))
        return out + x["residual"] if residual else out

    product = 2 * rows * inner * columns
    return Work(
        op="linear", case=case, dtype=dtype, make=make, truth=eager,
        contenders={"eager": eager, "fasttx": lambda x: fasttx.linear(**x, activation=activation)},
        leaves=("x", "weight", "bias", *(("residual",) if residual else ())),
        directions=("forward", "step"), flops={"forward": product, "step": 3 * product},
        shape={"rows": rows, "inner": inner, "columns": columns},
        features={"activation": activation, "residual": residual, "transposed": transposed},
    )  # fmt: skip


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [
        case
        for dtype in dtypes
        for case in (work(128, 768, 3072, dtype, "gelu"), work(128, 3072, 768, dtype, None, True))
    ]


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    more = [
        case
        for dtype in dtypes
        for case in (
            work(1024, 768, 768, dtype),
            work(1024, 768, 2304, dtype, transposed=True),
            work(1, 768, 3072, dtype, "gelu"),
        )
    ]
    return quick_cases(dtypes) + more
