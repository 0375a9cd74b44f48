"""attention_decode: one new token of 12 heads against a cache of 2048 keys and its kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fasttx

from .attention_case import DTYPES
from .generic import Inputs, Work

# Decoding reads the same cache step after step: a timed call is a few steps, so that a cache that
# fits in the machine's is read from there.
STEPS = 8
# (must, aim) ratios to SDPA, 12 heads of 64, 2048 keys, one thread.
GOALS = {
    ("bf16", 1): (20.0, 33.0),
    ("bf16", 8): (7.0, 10.0),
    ("fp32", 1): (1.7, 2.2),
    ("fp32", 8): (1.4, 1.9),
}


def _truth(x: Inputs) -> Tensor:
    group = x["q"].shape[1] // x["k_cache"].shape[1]
    k, v = (x[name].repeat_interleave(group, 1) for name in ("k_cache", "v_cache"))
    logits = x["q"] @ k.transpose(2, 3) * x["q"].shape[3] ** -0.5
    S, T = logits.shape[2:]
    hidden = torch.arange(T, device=k.device) > torch.arange(S, device=k.device)[:, None] + T - S
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _sdpa(x: Inputs) -> Tensor:
    q, k = x["q"], x["k_cache"]
    mask = None
    if q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[2] - q.shape[2])
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, x["v_cache"], mask, enable_gqa=gqa)


def _fasttx(x: Inputs) -> Tensor:
    return fasttx.attention_decode(x["q"], x["k_cache"], x["v_cache"], x["lengths"])


def _paged(x: Inputs) -> Tensor:
    return fasttx.attention_decode(
        x["q"], x["k_pages"], x["v_pages"], x["lengths"], block_table=x["table"]
    )


def _steps(function):
    def timed(x: Inputs, direction: str):
        def call():
            with torch.no_grad():
                for _ in range(STEPS):
                    function(x)

        return call

    return timed


def work(dtype, batch, heads=12, groups=12, queries=1, keys=2048, head_dim=64, page=None):
    def make(device, generator) -> Inputs:
        def randn(*shape):
            x = torch.randn(shape, generator=generator, device=device)
            return x.to(DTYPES[dtype])

        x = {
            "q": randn(batch, heads, queries, head_dim),
            "k_cache": randn(batch, groups, keys, head_dim),
            "v_cache": randn(batch, groups, keys, head_dim),
            "lengths": torch.full((batch,), keys, dtype=torch.int32, device=device),
        }
        if page:
            pages = batch * keys // page
            order = torch.randperm(pages, generator=generator, device=device)
            x["table"] = order.view(batch, -1).int()
            for name in ("k", "v"):
                split = x[f"{name}_cache"].unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
                x[f"{name}_pages"] = torch.empty_like(split).index_copy_(0, order, split)
        return x

    ours = _paged if page else _fasttx
    contenders = {"eager": _sdpa, "fasttx": ours}
    name = f"B{batch} H{heads}/{groups} S{queries} T{keys} D{head_dim}" + (
        f" pages of {page}" if page else ""
    )
    size = DTYPES[dtype].itemsize
    caches = 2 * batch * groups * keys * head_dim
    plain = (heads, groups, queries, keys, head_dim, page) == (12, 12, 1, 2048, 64, None)
    goal = GOALS.get((dtype, batch)) if plain else None
    return Work(
        op="attention_decode",
        case=name,
        dtype=dtype,
        make=make,
        truth=_truth,
        contenders=contenders,
        directions=("forward",),
        timed={n: _steps(f) for n, f in contenders.items()},
        flops={"forward": STEPS * 4 * batch * heads * queries * keys * head_dim},
        moved={"forward": STEPS * size * (caches + 2 * batch * heads * queries * head_dim)},
        goals={"forward": goal} if goal else {},
        shape={"batch": batch, "heads": heads, "keys": keys, "head_dim": head_dim},
    )


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [work(dtype, batch) for dtype in dtypes for batch in (1, 8)]


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [work(*key) for key in GOALS if key[0] in dtypes]


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    cases = quick_cases(dtypes)
    for dtype in dtypes:
        cases += [
            work(dtype, 1, page=16),
            work(dtype, 8, page=64),
            work(dtype, 1, heads=32, groups=8, head_dim=128),
            work(dtype, 1, queries=4),
            work(dtype, 1, keys=32768),
        ]
    return cases
