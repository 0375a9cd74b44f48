"""The feed-forward layer beside PyTorch's two linears, activation and dropouts: training sizes, and
decoding with weights in the cache or, one of many copies after the other, in memory.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from .attention_case import DTYPES
from .generic import Work

SIZES = (768, 3072, 768)
SEED = 1234
COPIES = 16  # of the weights of a decoding step from memory: more than any cache holds
# (must, aim) ratios to PyTorch, one thread.
GOALS = {
    (128, "bf16", "forward"): (1.12, 1.2),
    (1024, "bf16", "forward"): (1.06, 1.13),
    (128, "fp32", "forward"): (1.25, 1.5),
    (1024, "fp32", "forward"): (1.12, 1.2),
    (128, "bf16", "step"): (1.1, None),
    (1024, "bf16", "step"): (1.1, None),
    (128, "fp32", "step"): (1.15, None),
    (1024, "fp32", "step"): (1.15, None),
    (1, "bf16", "cache"): (2.8, None),
    (8, "bf16", "cache"): (1.8, None),
    (1, "bf16", "memory"): (1.6, None),
    (8, "bf16", "memory"): (1.8, None),
}


def work(
    rows: int,
    dtype: str,
    activation: str = "gelu",
    gate: bool = False,
    dropout: float = 0.0,
    transposed: bool = False,
    weights: str | None = None,
    sizes: tuple[int, int, int] = SIZES,
) -> Work:
    """weights: "cache" or "memory" makes it a decoding step, without gradients."""
    import fasttx
    from fasttx.reference.philox import philox_mask

    K, hidden, N = sizes
    case = f"{rows}x{K}x{hidden}x{N} {activation}" + " gated" * gate
    case += f" dropout {dropout:g}" if dropout else ""
    case += " transposed weights" * transposed + (f" from {weights}" if weights else "")
    plain = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[activation]
    copies = COPIES if weights == "memory" else 1
    names = ("w1", "b1", "w2", "b2", *(("w_gate", "b_gate") if gate else ()))

    def make(device, generator):
        def normal(*size):
            t = torch.randn(size, generator=generator, device=device).to(DTYPES[dtype])
            if len(size) == 1:
                return t
            t = t * size[1] ** -0.5
            return t.t().contiguous().t() if transposed else t

        x = {"x": torch.randn(rows, K, generator=generator, device=device).to(DTYPES[dtype])}
        shapes = {"w1": (hidden, K), "b1": (hidden,), "w2": (N, hidden), "b2": (N,)}
        shapes |= {"w_gate": (hidden, K), "b_gate": (hidden,)}
        x |= {n: normal(*shapes[n]) for n in names}
        if dropout:
            seed = torch.tensor([SEED], device=device)
            x["keep_h"] = philox_mask(seed, dropout, 1, 1, rows, hidden)[0, 0]
            x["keep"] = philox_mask(seed, dropout, 1, 2, rows, N)[0, 1]
        return x

    def layer(x, drop):
        h = plain(F.linear(x["x"], x["w1"], x["b1"]))
        if gate:
            h = h * F.linear(x["x"], x["w_gate"], x["b_gate"])
        return drop(F.linear(drop(h, "keep_h"), x["w2"], x["b2"]), "keep")

    def truth(x):
        return layer(x, lambda t, keep: t * x[keep] / (1 - rate) if dropout else t)

    def eager(x):
        return layer(x, lambda t, _: F.dropout(t, dropout) if dropout else t)

    def ours(x, seed=None):
        tensors = {n: x[n] for n in ("x", *names)}
        drops = {"hidden_dropout_p": dropout, "dropout_p": dropout, "seed": seed}
        return fasttx.ffn(**tensors, activation=activation, **drops)

    def in_turn(function):
        """The call on one copy of the weights after the other."""

        def timed(x, direction):
            many = [{**x, **{n: x[n].detach().clone() for n in names}} for _ in range(copies)]
            turn = itertools.cycle(many)

            def call():
                with torch.no_grad():
                    return function(next(turn))

            return call

        return timed

    rate = int(dropout * 65536 + 0.5) / 65536
    product = 2 * rows * hidden * (K * (1 + gate) + N)
    read = hidden * (K * (1 + gate) + N) * DTYPES[dtype].itemsize
    usual = (gate, dropout, transposed, sizes) == (False, 0.0, False, SIZES)
    directions = ("forward",) if weights else ("forward", "step")
    goals = {d: GOALS.get((rows, dtype, weights or d)) for d in directions} if usual else {}
    return Work(
        op="ffn", case=case, dtype=dtype, make=make, truth=truth,
        contenders={"eager": eager, "fasttx": ours},
        checks={"eager": None, "fasttx": lambda x: ours(x, SEED)} if dropout else {},
        timed={"eager": in_turn(eager), "fasttx": in_turn(ours)} if weights == "memory" else {},
        leaves=() if weights else ("x", *names), directions=directions,
        flops={"forward": product, "step": 3 * product}, moved={"forward": read} if weights else {},
        goals={d: goal for d, goal in goals.items() if goal},
        shape={"rows": rows, "inner": K, "hidden": hidden, "columns": N},
        features={
            "activation": activation, "gate": gate, "dropout": dropout, "transposed": transposed,
        },
    )  # fmt: skip


def must_cases(dtypes: tuple[str, ...]) -> list[Work]:
    cases = [work(rows, dtype) for rows in (128, 1024) for dtype in dtypes]
    if "bf16" in dtypes:
        cases += [work(m, "bf16", weights=w) for m in (1, 8) for w in ("cache", "memory")]
    return cases


def quick_cases(dtypes: tuple[str, ...]) -> list[Work]:
    return [work(128, dtype) for dtype in dtypes]


def full_cases(dtypes: tuple[str, ...]) -> list[Work]:
    more = [
        case
        for d in dtypes
        for case in (
            work(512, d, "silu", gate=True),
            work(512, d, dropout=0.1),
            work(128, d, transposed=True),
            work(1, d, transposed=True, weights="cache"),
        )
    ]
    return must_cases(dtypes) + more
