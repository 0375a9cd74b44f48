"""softmax beside PyTorch's, into memory that is there; with scale and mask beside a chain of calls.

A fresh output of 32 MB and more costs several times what its softmax does, in page faults, so the
plain rows hand both their output.
"""

from __future__ import annotations

import torch

from .attention_case import DTYPES
from .generic import Work

# (must, aim) ratios to PyTorch, one thread.
GOALS = {
    ("8192x1024", "bf16"): (1.8, 2.4),
    ("8192x1024", "fp32"): (1.2, 2.1),
    ("8x12x256x256 scale, float mask", "bf16"): (2.5, None),
    ("8x12x256x256 scale, float mask", "fp32"): (2.5, None),
    ("8x12x256x256 scale, bool mask", "bf16"): (2.5, None),
    ("8x12x256x256 scale, bool mask", "fp32"): (2.5, None),
}
ON_TWO_THREADS = {("8192x1024", "fp32"): (1.7, None)}
SCALE = 0.125


def plain(shape: tuple[int, ...], dtype: str, dim: int = -1, log: bool = False) -> Work:
    import fasttx

    case = "x".join(map(str, shape)) + (f" dim {dim}" if dim != -1 else "") + " log" * log
    ours, theirs = (
        (fasttx.log_softmax, torch.log_softmax) if log else (fasttx.softmax, torch.softmax)
    )

    def make(device, generator):
        x = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
        return {"x": x, "out": torch.empty_like(x)}

    goals = {"forward": GOALS.get((case, dtype)), ("forward", 2): ON_TWO_THREADS.get((case, dtype))}
    bytes_moved = 2 * torch.Size(shape).numel() * DTYPES[dtype].itemsize
    return Work(
        op="softmax", case=case, dtype=dtype, make=make, directions=("forward",),
        truth=lambda x: theirs(x["x"], dim),
        contenders={
            "eager": lambda x: theirs(x["x"], dim, out=x["out"]),
            "fasttx": lambda x: ours(x["x"], dim=dim, out=x["out"]),
        },
        moved={"forward": bytes_moved}, goals={k: goal for k, goal in goals.items() if goal},
        shape={"rows": torch.Size(shape[:-1]).numel(), "columns": shape[-1]},
        features={"dim": dim, "log": log},
    )  # fmt: skip


def masked(shape: tuple[int, int, int, int], dtype: str, kind: str) -> Work:
    import fasttx

    case = "x".join(map(str, shape)) + f" scale, {kind} mask"

    def make(device, generator):
        x = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
        visible = torch.arange(shape[-1], device=device) < torch.linspace(
            shape[-1] // 2, shape[-1], shape[0], device=device
        ).view(-1, 1, 1, 1)
        if kind == "bool":
            return {"x": x, "mask": visible}
        return {
            "x": x,
            "mask": torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, -1e4),
        }

    def chain(x):
        z = x["x"] * SCALE
        z = z.masked_fill(~x["mask"], -torch.inf) if kind == "bool" else z + x["mask"]
        return torch.softmax(z, -1)

    goal = GOALS.get((case, dtype))
    size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    return Work(
        op="softmax", case=case, dtype=dtype, make=make, truth=chain, leaves=("x",),
        contenders={
            "eager": chain,
            "fasttx": lambda x: fasttx.softmax(x["x"], scale=SCALE, mask=x["mask"]),
        },
        directions=("forward", "step"), moved={"forward": 2 * size, "step": 5 * size},
        goals={"forward": goal} if goal else {},
        shape={"rows": torch.Size(shape[:-1]).numel(), "columns": shape[-1]},
        features={"mask": kind},
    )  # fmt: skip


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    masks = [masked((8, 12, 256, 256), d, kind) for kind in ("float", "bool") for d in dtypes]
    return [*(plain((8192, 1024), d) for d in dtypes), *masks]


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return must_cases(dtypes)


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    more = [
        work
        for d in dtypes
        for work in (
            plain((1536, 128), d),
            plain((64, 1 << 17), d),
            plain((8192, 1024), d, log=True),
            plain((16, 512, 1024), d, dim=1),
        )
    ]
    return quick_cases(dtypes) + more
