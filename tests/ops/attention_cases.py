"""The cases every attention backend is held to: fp64 inputs, options, and what is
differentiated."""
# ruff: noqa: E501 (a table, one case a line)

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fasttx
from fasttx.ops._attention_checks import checked
from fasttx.reference.attention import attention_math


@dataclass
class Case:
    """inputs: fp64 tensors by attention's argument names, with table, slopes, positions beside
    them. options: the rest."""

    name: str
    inputs: dict[str, Tensor]
    options: dict = field(default_factory=dict)
    wanted: tuple[str, ...] = ("query", "key", "value")
    bias: Callable | None = None
    keep: tuple[str, ...] = ()
    layouts: dict[str, str] = field(default_factory=dict)

    def plain(self, dtype: torch.dtype) -> tuple[Callable, ...]:
        """The yardsticks, plain PyTorch in dtype: autograd through a softmax, and in fp32 the
        reference, which has every backend's residuals: delta = rowsum(dout * out) rounds at the
        size of dP where softmax's own backward cancels exactly (one visible key: 3e-7, 3e-8)."""
        composed = self.function("reference", compute=dtype)
        return (composed, self.function("reference")) if dtype is torch.float32 else (composed,)

    def function(
        self, backend: str, compute: torch.dtype | None = None, lse: bool = True
    ) -> Callable:
        """attention as a function of the named inputs, (out, lse) or out; `compute` runs plain
        PyTorch in that dtype instead."""

        def call(**inputs):
            extra = {n: inputs.pop(n) for n in ("table", "slopes", "positions") if n in inputs}
            options = dict(self.options)
            if self.bias is not None:
                options["position_bias"] = self.bias(**extra)
            if compute is None:
                return fasttx.attention(**inputs, **options, return_lse=lse, backend=backend)
            found = _plain(inputs, options, compute)
            return found if lse else found[0]

        return call


def _plain(inputs: dict, options: dict, compute: torch.dtype):
    named = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "position_bias": None, "window": None,
             "softcap": None, "cu_seqlens": None, "seed": None, **inputs, **options, "backend": None}  # fmt: skip
    (q, k, v, mask, table), rest, scalars, leading = checked(**named)
    slopes, positions, *packed = rest
    out, lse = attention_math(
        q, k, v, mask, slopes, positions, table, *packed, *scalars, compute=compute
    )
    if leading is not None:
        out, lse = (
            out.reshape(leading + out.shape[-2:]),
            lse.reshape(leading + lse.shape[-1:]),
        )
    return out, lse


def qkv(B=2, H=2, S=37, T=None, D=16, G=None, Dv=None, seed=0) -> dict[str, Tensor]:
    T, G, Dv = S if T is None else T, H if G is None else G, D if Dv is None else Dv
    g = torch.Generator().manual_seed(seed)
    shapes = {"query": (B, H, S, D), "key": (B, G, T, D), "value": (B, G, T, Dv)}
    return {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}


def random(*shape, seed=1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padding(B: int, T: int) -> Tensor:
    """bool [B, 1, 1, T]; the last sequence wholly padding."""
    lengths = torch.tensor([max(0, T - 5 * i) for i in range(B - 1)] + [0])
    return (torch.arange(T) < lengths[:, None])[:, None, None]


def some_hidden(*shape) -> Tensor:
    """bool mask with scattered holes and a few rows without any key."""
    mask = random(*shape, seed=5) > 0
    mask[..., 1::5, :] = False
    return mask


def additive(*shape) -> Tensor:
    """float mask with exact -inf holes and finite minima, which are only numbers."""
    mask = random(*shape, seed=6)
    mask = mask.masked_fill(random(*shape, seed=7) > 1.2, -torch.inf)
    return mask.masked_fill(random(*shape, seed=8) > 1.8, -1e4)


def relative(**options) -> Callable:
    return lambda table: fasttx.RelativePositionBias(table, **options)


WITH_MASK = ("query", "key", "value", "attn_mask")
WITH_TABLE = ("query", "key", "value", "table")


def cases(fast: bool = False) -> list[Case]:
    """Every feature alone and the pairs that share code; `fast` keeps those a slow backend can
    afford in the quick suite."""
    few = [
        Case("plain", qkv()),
        Case("one query", qkv(S=1, T=19)),
        Case("one key", qkv(S=5, T=1)),
        Case("no keys", qkv(S=5, T=0)),
        Case("no queries", qkv(S=0, T=4)),
        Case("causal", qkv(S=70, D=8), {"is_causal": True}),
        Case("lower right, S < T", qkv(S=9, T=41), {"is_causal": "lower_right"}),
        Case("lower right, S > T", qkv(S=41, T=9), {"is_causal": "lower_right"}),
        Case(
            "window and softcap, grouped", qkv(H=4, G=2, S=45), {"window": (7, 3), "softcap": 5.0}
        ),
        Case(
            "padding",
            {**qkv(B=3), "attn_mask": padding(3, 37)},
            layouts={"query": "transposed", "dout": "transposed"},
        ),
        Case(
            "bool mask with empty rows",
            {**qkv(), "attn_mask": some_hidden(2, 1, 37, 37)},
            layouts={"key": "sliced", "dout": "expanded"},
        ),
        Case(
            "float mask [1,H,S,T]",
            {**qkv(S=21, T=33), "attn_mask": additive(1, 2, 21, 33)},
            {"is_causal": True},
            WITH_MASK,
        ),
        Case("float mask [B,1,1,T]", {**qkv(), "attn_mask": additive(2, 1, 1, 37)}, {}, WITH_MASK),
        Case(
            "ALiBi",
            {**qkv(H=3, S=35), "slopes": fasttx.ALiBi.standard_slopes(3)},
            {"is_causal": True},
            bias=lambda slopes: fasttx.ALiBi(slopes),
            keep=("slopes",),
        ),
        Case(
            "relative",
            {**qkv(S=40), "table": random(8, 2)},
            {},
            WITH_TABLE,
            relative(max_distance=20),
        ),
        Case(
            "relative, causal, dropout",
            {**qkv(S=23, T=31, H=4, G=1), "table": random(6, 4)},
            {"is_causal": "lower_right", "dropout_p": 0.2, "seed": 11},
            WITH_TABLE,
            relative(bidirectional=False, max_distance=9),
        ),
        Case("dropout", qkv(S=43, D=24), {"dropout_p": 0.3, "seed": -(2**40) - 7}),
        Case(
            "packed",
            qkv(B=1, S=50),
            {"cu_seqlens": torch.tensor([0, 13, 13, 14, 47]), "is_causal": True},
        ),
        Case(
            "packed cross, dropout",
            qkv(B=1, S=20, T=33),
            {
                "cu_seqlens": (torch.tensor([0, 7, 7, 20]), torch.tensor([0, 20, 29, 33])),
                "dropout_p": 0.1,
                "seed": 5,
            },
        ),
        Case(
            "wide value, odd head",
            qkv(D=5, Dv=33, S=18),
            {},
            layouts={"value": "strided", "query": "strided"},
        ),
        Case("head size 256", qkv(B=1, S=20, D=256), {"is_causal": True}),
    ]
    if fast:
        return few
    return [
        *few,
        Case("all of size one", qkv(1, 1, 1, 1, 1)),
        Case("no batch", qkv(B=0)),
        Case("head size 1", qkv(D=1)),
        Case("head size 64, long", qkv(B=1, H=2, S=300, D=64), {"is_causal": True}),
        Case("head size 128", qkv(B=1, S=150, D=128)),
        Case("head size 80, grouped", qkv(H=6, G=3, D=80, S=67)),
        Case("multi-query, causal", qkv(H=4, G=1, S=66, D=32), {"is_causal": True}),
        Case("causal, S < T", qkv(S=20, T=50), {"is_causal": True}),
        Case("causal, S > T", qkv(S=50, T=20), {"is_causal": True}),
        Case("window, one side", qkv(S=80), {"window": (9, None)}),
        Case("window, lower right", qkv(S=30, T=90), {"window": (9, 4), "is_causal": "lower_right"}),
        Case("window of nothing but itself", qkv(S=30), {"window": (0, 0)}),
        Case("window wider than everything", qkv(S=30), {"window": (500, 500)}),
        Case("softcap", qkv(), {"softcap": 2.0, "scale": 1.5}),
        Case("negative scale", qkv(), {"scale": -0.3}),
        Case("bool mask [S,T]", {**qkv(), "attn_mask": some_hidden(37, 37)}),
        Case("bool mask [1,H,1,T]", {**qkv(), "attn_mask": some_hidden(1, 2, 5, 37)[:, :, :1]}),
        Case("bool mask [B,1,S,1]", {**qkv(), "attn_mask": some_hidden(2, 1, 37, 1)}),
        Case("float mask [S,T]", {**qkv(), "attn_mask": additive(37, 37)}, {}, WITH_MASK),
        Case("float mask [1,1,S,T]", {**qkv(), "attn_mask": additive(1, 1, 37, 37)}, {"softcap": 4.0}, WITH_MASK, layouts={"attn_mask": "transposed"}),
        Case("float mask [B,1,S,T]", {**qkv(S=33, T=70), "attn_mask": additive(2, 1, 33, 70)}, {}, WITH_MASK, layouts={"attn_mask": "sliced"}),
        Case("float mask [B,H,S,T]", {**qkv(H=4, G=2), "attn_mask": additive(2, 4, 37, 37)}, {"dropout_p": 0.1, "seed": 3}, WITH_MASK),
        Case("float mask [1,1,1,1]", {**qkv(), "attn_mask": random(1, 1, 1, 1)}, {}, WITH_MASK),
        Case("rows of finite minima", {**qkv(S=21, T=26), "attn_mask": torch.zeros(21, 26).index_fill(0, torch.tensor([2, 9]), torch.finfo(torch.float32).min)}, {}, keep=("attn_mask",)),
        Case("float mask in fp32", {**qkv(), "attn_mask": additive(1, 2, 37, 37).float()}, {}, WITH_MASK, keep=("attn_mask",)),
        Case("ALiBi [B,H] with positions", {**qkv(S=35), "slopes": random(2, 2).abs().float(), "positions": padding(2, 35)[:, 0, 0].flip(0).long().cumsum(-1)}, {}, bias=lambda slopes, positions: fasttx.ALiBi(slopes, positions), keep=("slopes",)),
        Case("relative, long", {**qkv(B=1, H=2, S=290, D=64), "table": random(32, 2)}, {}, WITH_TABLE, relative()),
        Case("relative with a query offset", {**qkv(S=20, T=44), "table": random(32, 2)}, {}, WITH_TABLE, relative(query_offset=3)),
        Case("relative and mask", {**qkv(B=3), "table": random(8, 2), "attn_mask": padding(3, 37)}, {}, WITH_TABLE, relative(max_distance=16)),
        Case("packed, ALiBi a sequence", {**qkv(B=1, S=60), "slopes": random(3, 2).float()}, {"cu_seqlens": torch.tensor([0, 21, 22, 60]), "is_causal": True}, bias=lambda slopes: fasttx.ALiBi(slopes), keep=("slopes",)),
        Case("packed, relative", {**qkv(B=1, S=60, H=4, G=2), "table": random(8, 4)}, {"cu_seqlens": torch.tensor([0, 21, 22, 55]), "window": (9, 9)}, WITH_TABLE, relative(max_distance=12)),
        Case("two dimensions", {n: t[0, 0] for n, t in qkv().items()}, {"is_causal": True}),
        Case("three dimensions", {n: t[0] for n, t in qkv().items()} | {"attn_mask": some_hidden(37, 37)}),
        Case("five dimensions", {n: t[:, None].expand(2, 3, *t.shape[1:]) for n, t in qkv().items()} | {"attn_mask": additive(3, 1, 37, 37)}, {}, WITH_MASK),
        Case("every layout", qkv(S=40, T=52), {}, layouts={"query": "sliced", "key": "transposed", "value": "strided", "dout": "sliced", "dlse": "strided"}),
        Case("large logits", {n: 8 * t for n, t in qkv().items()}, {"is_causal": True}),
        Case("equal logits", {n: torch.ones_like(t) for n, t in qkv().items()}),
        Case("everything", {**qkv(B=2, H=4, G=2, S=61, T=75, D=40, Dv=24), "table": random(16, 4), "attn_mask": additive(2, 1, 61, 75)}, {"is_causal": "lower_right", "window": (40, None), "softcap": 6.0, "dropout_p": 0.15, "seed": 2**50}, ("query", "key", "value", "attn_mask", "table"), relative(max_distance=30)),
    ]  # fmt: skip
