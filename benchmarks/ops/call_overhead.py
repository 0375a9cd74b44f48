"""What a call costs before any work: a tiny tensor through the whole door."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..harness import Call
from .attention_case import DTYPES
from .generic import Inputs, Work

# (must, aim) seconds of the forward; F.scaled_dot_product_attention takes about 5 and 4 us.
GRAD, NO_GRAD = (14e-6, None), (7e-6, None)


def _timed(function, grad: bool):
    # The context manager would cost a microsecond of its own.
    switch = torch._C._set_grad_enabled

    def call(x: Inputs, direction: str) -> Call:
        def run():
            switch(grad)
            out = function(x)
            switch(True)
            return out

        return run

    return call


def work(op: str, dtype: str, grad: bool) -> Work:
    import fasttx

    def attention_inputs(device, generator):
        return {n: torch.randn(1, 1, 1, 8, generator=generator).to(device, DTYPES[dtype])
                for n in ("query", "key", "value")}  # fmt: skip

    def norm_inputs(device, generator):
        x = {n: torch.randn(1, 8, generator=generator) for n in ("x", "residual")}
        x |= {n: torch.randn(8, generator=generator) for n in ("weight", "bias")}
        return {n: t.to(device, DTYPES[dtype]) for n, t in x.items()}

    def norm(x, residual, weight, bias):
        return F.layer_norm(x + residual, x.shape[-1:], weight, bias)

    make, ours, theirs = {
        "attention": (attention_inputs, fasttx.attention, F.scaled_dot_product_attention),
        "add_norm": (norm_inputs, fasttx.add_norm, norm),
    }[op]
    contenders = {"eager": lambda x: theirs(**x), "fasttx": lambda x: ours(**x)}
    leaves = ("query", "key", "value") if op == "attention" else ("x", "residual", "weight", "bias")
    return Work(
        op="call_overhead", case=f"{op} {'in grad mode' if grad else 'without grad'}", dtype=dtype,
        make=make, truth=contenders["eager"], contenders=contenders,
        timed={n: _timed(f, grad) for n, f in contenders.items()}, leaves=leaves,
        directions=("forward",), times={"forward": GRAD if grad else NO_GRAD},
    )  # fmt: skip


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    """One dtype: the door does not care."""
    return [work(op, dtypes[0], g) for op in ("attention", "add_norm") for g in (False, True)]
