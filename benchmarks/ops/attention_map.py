"""attention_map beside the softmax of all scores: one head's map, or all heads as a small grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention_case import DTYPES
from .generic import Work


def work(
    tokens: int, dtype: str, pool: int | None = None, heads: int = 12, head_dim: int = 64
) -> Work:
    """pool: the grid of every head; without it the last head's whole map."""
    import fasttx

    chosen = None if pool else [heads - 1]

    def make(device, generator):
        shape = (1, heads, tokens, head_dim)
        x = {
            name: torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
            for name in ("q", "k")
        }
        _, x["lse"] = fasttx.attention(x["q"], x["k"], x["k"], is_causal=True, return_lse=True)
        return x

    def full(x):
        q, k = (x[n] if pool else x[n][:, chosen] for n in ("q", "k"))
        logits = q @ k.transpose(2, 3) * head_dim**-0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return F.adaptive_avg_pool2d(p, pool) if pool else p

    def ours(x):
        return fasttx.attention_map(
            x["q"], x["k"], x["lse"], heads=chosen, pool=pool, is_causal=True
        )

    seen = 1 if chosen else heads
    return Work(
        op="attention_map", dtype=dtype, make=make, truth=full, directions=("forward",),
        case=f"{heads}x{tokens}x{head_dim} causal, " + (f"pool {pool}" if pool else "one head"),
        contenders={"eager": full, "fasttx": ours},
        flops={"forward": 2 * seen * tokens * tokens * head_dim},
        shape={"heads": heads, "queries": tokens, "keys": tokens}, features={"pool": pool or 0},
    )  # fmt: skip


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [work(n, d, pool) for d in dtypes for n, pool in ((512, None), (1024, 32))]


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return quick_cases(dtypes) + [work(4096, d, 64, heads=4) for d in dtypes]
