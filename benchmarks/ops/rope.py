"""Rotary embedding of q and k beside transformers' formula in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import fasttx

from .attention_case import DTYPES
from .generic import Inputs, Work

GOAL = (1.5, None)
# A call on a single token is shorter than the clock's tick.
CALLS_OF_ONE = 64


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def work(dtype, batch, heads, groups, rows, head_dim, order="BSHD", form="", goal=GOAL) -> Work:
    interleaved, inplace = "interleaved" in form, "in place" in form

    def make(device, generator) -> Inputs:
        def head(n):
            shape = (batch, n, rows, head_dim) if order == "BHSD" else (batch, rows, n, head_dim)
            t = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
            return t if order == "BHSD" else t.transpose(1, 2)

        rates = 10000 ** (torch.arange(0, head_dim, 2, device=device) / -head_dim)
        angles = torch.arange(rows, device=device)[:, None] * rates
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        x = {"q": head(heads), "k": head(groups)}
        return x | {n: f(angles)[None].to(DTYPES[dtype]) for n, f in _TABLES.items()}

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        cos, sin = x["cos"][:, None], x["sin"][:, None]
        return tuple(x[n] * cos + _turned(x[n], interleaved) * sin for n in ("q", "k"))

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        return fasttx.rope(x["q"], x["k"], x["cos"], x["sin"], interleaved=interleaved)

    def turned_in_place(x: Inputs) -> tuple[Tensor, ...]:
        q, k = (x[n] * 1 for n in ("q", "k"))
        return fasttx.rope(q, k, x["cos"], x["sin"], interleaved=interleaved, inplace=True)

    def repeated(function):
        def timed(x: Inputs, direction: str):
            def call():
                with torch.no_grad():
                    for _ in range(CALLS_OF_ONE if rows == 1 else 1):
                        function(x)

            return call

        return timed

    def in_place(x: Inputs) -> None:
        fasttx.rope(x["q"], x["k"], x["cos"], x["sin"], interleaved=interleaved, inplace=True)

    timed, checks = {}, {}
    if inplace:
        timed = {"eager": repeated(eager), "fasttx": repeated(in_place)}
        checks = {"eager": eager, "fasttx": turned_in_place}
    elif rows == 1:
        timed = {"eager": repeated(eager), "fasttx": repeated(ours)}
    forward_only = inplace or rows == 1
    directions = ("forward",) if forward_only else ("forward", "backward")
    moved = 2 * batch * (heads + groups) * rows * head_dim * DTYPES[dtype].itemsize
    return Work(
        op="rope",
        case=f"B{batch} H{heads}/{groups} S{rows} D{head_dim} {order}" + f" {form}" * bool(form),
        dtype=dtype,
        make=make,
        truth=eager,
        contenders={"eager": eager, "fasttx": turned_in_place if inplace else ours},
        checks=checks,
        timed=timed,
        leaves=() if forward_only else ("q", "k"),
        directions=directions,
        moved=dict.fromkeys(directions, moved * (CALLS_OF_ONE if rows == 1 else 1)),
        goals=dict.fromkeys(directions, goal),
        shape={"batch": batch, "heads": heads, "rows": rows, "head_dim": head_dim},
        features={"order": order, "form": form},
    )


_TABLES = {"cos": torch.cos, "sin": torch.sin}


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [
        case
        for dtype in dtypes
        for case in (
            work(dtype, 4, 12, 12, 512, 64),
            work(dtype, 4, 12, 12, 512, 64, "BHSD"),
            work(dtype, 4, 12, 12, 512, 64, form="interleaved"),
            work(dtype, 4, 12, 12, 512, 64, form="in place"),
            work(dtype, 1, 32, 8, 1, 128),
        )
    ]


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return must_cases(dtypes)


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    more = [work(dtype, 1, 32, 8, 2048, 128, goal=(None, None)) for dtype in dtypes]
    return quick_cases(dtypes) + more
