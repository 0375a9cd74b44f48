"""Linear and cross-entropy in one, beside PyTorch's two steps: forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .generic import Work

ROWS, INNER, CLASSES = 1024, 768, 50257
ALL, SOME = (1.0, None), (3.0, None)


def work(
    rows: int,
    inner: int,
    classes: int,
    dtype: str,
    labels: float = 1.0,
    reduction: str = "mean",
    goal: tuple | None = None,
) -> Work:
    """labels: the share of rows that have one."""
    import fasttx

    def make(device, generator):
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device)

        target = torch.randint(0, classes, (rows,), generator=generator, device=device)
        chosen = torch.randperm(rows, generator=generator, device=device)
        target[chosen[int(labels * rows) :]] = -100
        x, weight = normal(rows, inner), normal(classes, inner) * inner**-0.5
        return {"x": x.to(kind), "weight": weight.to(kind), "target": target}

    def eager(x):
        logits = F.linear(x["x"], x["weight"])
        return F.cross_entropy(logits, x["target"], reduction=reduction)

    def ours(x):
        return fasttx.linear_cross_entropy(x["x"], x["weight"], x["target"], reduction=reduction)

    product = 2 * int(labels * rows) * inner * classes
    return Work(
        op="linear_cross_entropy", case=f"{rows}x{inner}x{classes} {labels:.0%} {reduction}",
        dtype=dtype, make=make, truth=eager, contenders={"eager": eager, "fasttx": ours},
        leaves=("x", "weight"), directions=("step",), flops={"step": 3 * product},
        goals={"step": goal} if goal else {},
        shape={"rows": rows, "inner": inner, "classes": classes}, features={"labels": labels},
    )  # fmt: skip


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [work(256, 256, 16384, dtype, labels) for dtype in dtypes for labels in (1.0, 0.15)]


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return must_cases(dtypes)


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [
        work(ROWS, INNER, CLASSES, dtype, labels, reduction, goal)
        for dtype in dtypes
        for labels, goal in ((1.0, ALL), (0.15, SOME))
        for reduction in ("mean", "sum")
    ]
