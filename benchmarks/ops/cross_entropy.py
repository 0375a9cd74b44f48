"""Cross-entropy beside PyTorch's, the gradient in place too.

"step" is forward and backward: PyTorch's as it is, fasttx's with ``inplace_grad=True`` (which
overwrites the logits, so that later rounds see a gradient: the work is the same).

Much of PyTorch's time is page faults of fresh tensors. MALLOC_MMAP_MAX_=0 and a large
MALLOC_TRIM_THRESHOLD_ in the environment keep freed memory, and hold fasttx to goals of its own.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from .generic import Work

ROWS, CLASSES = 512, 50257
GOALS = {
    "fp32": {"forward": (8.0, 11.0), "step": (10.0, 17.0)},
    "bf16": {"forward": (5.0, 7.5), "step": (7.0, 9.5)},
}
KEPT_MEMORY = os.environ.get("MALLOC_MMAP_MAX_") == "0"
if KEPT_MEMORY:
    GOALS = {
        dtype: {"forward": (must, None), "step": (must, None)}
        for dtype, must in (("fp32", 3.0), ("bf16", 2.4))
    }


def work(rows: int, classes: int, dtype: str, goals: dict | None = None) -> Work:
    import fasttx

    def make(device, generator):
        size = (rows, classes)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        logits = torch.randn(size, generator=generator, device=device).to(kind)
        target = torch.randint(0, classes, (rows,), generator=generator, device=device)
        return {"logits": logits, "target": target}

    def truth(x):
        wide = torch.promote_types(x["logits"].dtype, torch.float32)
        return F.cross_entropy(x["logits"].to(wide), x["target"])

    def eager(x):
        return F.cross_entropy(x["logits"], x["target"])

    def ours(x):
        return fasttx.cross_entropy(x["logits"], x["target"])

    def timed(x, direction):
        if direction == "forward":

            def forward():
                with torch.no_grad():
                    return ours(x)

            return forward
        logits = x["logits"].detach().clone().requires_grad_()

        def step():
            loss = fasttx.cross_entropy(logits, x["target"], inplace_grad=True)
            return torch.autograd.grad(loss, logits)

        return step

    size = rows * classes * (4 if dtype == "fp32" else 2)
    return Work(
        op="cross_entropy", case=f"{rows}x{classes}" + KEPT_MEMORY * " without page faults",
        dtype=dtype, make=make, truth=truth,
        contenders={"eager": eager, "fasttx": ours}, leaves=("logits",),
        directions=("forward", "step"), timed={"fasttx": timed},
        moved={"forward": size, "step": 2 * size}, goals=goals or {},
        shape={"rows": rows, "classes": classes},
    )  # fmt: skip


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [work(ROWS, CLASSES, dtype) for dtype in dtypes]


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    shapes = ((ROWS, CLASSES), (2048, 32128), (4096, 1000))
    return [work(*shape, dtype) for shape in shapes for dtype in dtypes]


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [work(ROWS, CLASSES, dtype, GOALS.get(dtype)) for dtype in dtypes]
