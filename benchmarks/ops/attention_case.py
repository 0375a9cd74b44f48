"""An attention problem as data: shape, features, tensors, and how much arithmetic it is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("forward", "backward", "step")
BUCKETS = 32
MAX_DISTANCE = 128


@dataclass(frozen=True)
class Case:
    """q [B,H,S,D], k and v [B,G,T,D].

    topology: which part of which model has this shape. padding: share of the B x T keys hidden by
    a key padding mask, lengths falling from full (first row) to the shortest (last row). bias:
    "none", "alibi" (fixed slopes) or "relative" (T5's buckets, a table that needs its gradient).
    layout: "bhsd" contiguous, "bshd" as a projection leaves it. FLOPs count visible pairs only.
    """

    topology: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    kv_heads: int = 0
    causal: bool = False
    padding: float = 0.0
    dropout: float = 0.0
    bias: str = "none"
    layout: str = "bshd"

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        size = f"S{self.queries}" + (f"xT{self.keys}" if self.keys != self.queries else "")
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads else "")
        parts = [f"B{self.batch}", heads, size, f"D{self.head_dim}", *self.features]
        return f"{self.topology} {' '.join(parts)}"

    @property
    def features(self) -> list[str]:
        named = [
            (self.causal, "causal"),
            (self.padding, f"padding {self.padding:.0%}"),
            (self.dropout, f"dropout {self.dropout:g}"),
            (self.bias != "none", f"{self.bias} bias"),
        ]
        return [text for present, text in named if present]

    def lengths(self) -> list[int]:
        """Visible keys of each batch row."""
        if not self.padding:
            return [self.keys] * self.batch
        if self.batch == 1:
            return [max(1, round(self.keys * (1 - self.padding)))]
        step = 2 * self.padding * self.keys / (self.batch - 1)
        return [max(1, round(self.keys - row * step)) for row in range(self.batch)]

    def visible_pairs(self) -> int:
        """Visible (query, key) pairs over batch and heads; causal means key <= query."""
        total = 0
        for length in self.lengths():
            if not self.causal:
                total += self.queries * length
                continue
            ramp = min(self.queries, length)
            total += ramp * (ramp + 1) // 2 + (self.queries - ramp) * length
        return total * self.heads

    def flops(self, direction: str) -> int:
        """2 products of 2 * D a pair forward, 5 backward."""
        products = {"forward": 2, "backward": 5, "step": 7}[direction]
        return products * 2 * self.head_dim * self.visible_pairs()

    def shape(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.groups,
            "queries": self.queries,
            "keys": self.keys,
            "head_dim": self.head_dim,
        }

    def feature_facts(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "padding": self.padding,
            "dropout": self.dropout,
            "bias": self.bias,
            "layout": self.layout,
        }


@dataclass
class Tensors:
    """The inputs of one case. Only what the case asks for is there."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None
    keep: Tensor | None = None
    seed: int = 0

    def leaves(self) -> dict[str, Tensor]:
        found = {"q": self.q, "k": self.k, "v": self.v}
        if self.table is not None:
            found["table"] = self.table
        return found


def tensors(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Tensors:
    """Standard normal values from a generator seeded with ``seed``, rounded to the case's dtype."""
    device = torch.device(device)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(heads: int, length: int) -> Tensor:
        if case.layout == "bshd":
            size = (case.batch, length, heads, case.head_dim)
            made = torch.randn(size, generator=generator, device=device).transpose(1, 2)
        else:
            size = (case.batch, heads, length, case.head_dim)
            made = torch.randn(size, generator=generator, device=device)
        return made.to(case.torch_dtype)

    x = Tensors(
        q=normal(case.heads, case.queries).requires_grad_(),
        k=normal(case.groups, case.keys).requires_grad_(),
        v=normal(case.groups, case.keys).requires_grad_(),
        dout=normal(case.heads, case.queries),
        seed=1234 + seed,
    )
    if case.padding:
        lengths = torch.tensor(case.lengths(), device=device)
        x.mask = (torch.arange(case.keys, device=device) < lengths[:, None])[:, None, None, :]
    if case.bias == "alibi":
        x.slopes = torch.tensor([2.0 ** (-8.0 * (h + 1) / case.heads) for h in range(case.heads)])
        x.slopes = x.slopes.to(device)
    if case.bias == "relative":
        table = torch.randn(BUCKETS, case.heads, generator=generator, device=device)
        x.table = table.to(case.torch_dtype).requires_grad_()
    return x


def relative_buckets(queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
    """T5's bidirectional bucket of key j for query i, int64 [S, T] (arXiv 1910.10683)."""
    offset = keys - queries
    distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    distance = distance - offset
    half = BUCKETS // 2
    exact = half // 2
    size = distance.abs()
    far = torch.log(size.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias, hidden pairs removed), dropout, times v: as one writes it.

    keep (bool, like the probabilities) replaces the random choice where the bits must be known.
    """
    if k.shape[1] != q.shape[1]:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    probabilities = logits.softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep / kept_share(dropout)
    elif dropout:
        probabilities = torch.nn.functional.dropout(probabilities, dropout)
    return probabilities @ v


def kept_share(dropout: float) -> float:
    """The exact share that survives when the drop rate is rounded to 1 / 65536."""
    return 1.0 - min(65535, int(dropout * 65536 + 0.5)) / 65536


def bias_of(case: Case, x: Tensors, dtype: torch.dtype) -> Tensor | None:
    """The position bias as a tensor that broadcasts to [B,H,S,T], differentiable to the table."""
    if case.bias == "alibi":
        positions = torch.arange(case.keys, device=x.q.device, dtype=torch.float64)
        return (x.slopes.double()[:, None, None] * positions).to(dtype)[None]
    if case.bias == "relative":
        buckets = relative_buckets(case.queries, case.keys, x.q.device)
        return x.table[buckets].permute(2, 0, 1).to(dtype)[None]
    return None
