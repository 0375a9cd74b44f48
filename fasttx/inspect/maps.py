"""What one layer's attention looks like, made while the model runs: probabilities again from q, k
and lse. Up to FULL tokens whole maps; above that averages over a GRID x GRID grid, exact rows that
were asked for, and O(tokens) memory."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.attention import attention_fwd
from ..ops.attention_map import attention_map_fwd
from .calls import Capture

__all__ = ["FULL", "GRID", "LINKS", "AttentionMaps", "Rollout", "maps_of", "pooled_identity"]

FULL = 512  # tokens up to which whole maps are made
GRID = 64
LINKS = 16  # strongest keys kept of a row
_CELLS = 1 << 22  # of a block of rows
_SHARED = ("mask", "slopes", "positions", "table", "lut", "scale", "softcap", "left", "right",
           "lower_right", "bias_shift")  # fmt: skip


@dataclass
class AttentionMaps:
    """The heads of one layer, on one text; all tensors float32 on the CPU (float64 beside float64).

    name: of the module; kind: "encoder", "decoder" or "cross". full: [H,S,T], or None above FULL
    tokens. pooled: [H,GRID,GRID], or None where full is. rows: int64 [r], the query rows that
    follow: all, or those asked for; exact: [H,r,T] where full is None. stat_rows: how many
    rows the statistics [H] are the mean of: entropy in nats, distance |i - j| of a
    self-attention in tokens, and the share of the probability each head gives to the first token,
    the token itself, the one before, the one after. favourites: int64 [H,3], the keys with most
    probability over those rows, favourite_shares [H,3] how much on average.
    """

    name: str
    kind: str
    queries: int
    keys: int
    heads: int
    full: Tensor | None
    pooled: Tensor | None
    rows: Tensor
    exact: Tensor | None
    stat_rows: int
    statistics: dict[str, Tensor] = field(default_factory=dict)
    favourites: Tensor | None = None
    favourite_shares: Tensor | None = None

    def probabilities(self, row: int) -> Tensor:
        """[H,T] of one query row, among those that were kept."""
        if self.full is not None:
            return self.full[:, row]
        found = (self.rows == row).nonzero()
        if not len(found):
            raise ValueError(
                f"row must be one of the rows that were asked for, {self.rows.tolist()}, got {row}"
            )
        return self.exact[:, int(found[0])]


def maps_of(call: Capture, rows: list[int]) -> AttentionMaps:
    """rows: query rows to keep exactly above FULL tokens; those past the queries are left out."""
    _, H, S, _ = call.args["q"].shape
    T = call.args["k"].shape[2]
    chosen = torch.tensor([r for r in rows if r < S], dtype=torch.int64)
    maps = AttentionMaps(call.name, call.kind, S, T, H, None, None, chosen, None, 0)
    if max(S, T) <= FULL:
        maps.full = _map(call, None)
        maps.rows = torch.arange(S)
    else:
        maps.pooled = _map(call, None, GRID)
        maps.exact = _map(call, chosen)
    _statistics(maps, call)
    return maps


def _map(call: Capture, rows: Tensor | None, pool: int = 0) -> Tensor:
    """[H,r,T], or [H,pool,pool], of the first sequence."""
    args = call.args
    rows = None if rows is None else rows.to(args["q"].device)
    shared = [args[name] for name in _SHARED]
    p = attention_map_fwd(args["q"], args["k"], call.lse, None, rows, *shared, pool)
    return p[0].cpu()


def _statistics(maps: AttentionMaps, call: Capture) -> None:
    S, T, H = maps.queries, maps.keys, maps.heads
    sampled = torch.linspace(0, S - 1, min(S, FULL)).round().long()
    step = max(1, _CELLS // (H * T))
    names = ["entropy", "first"] + ([] if maps.kind == "cross" else ["distance", "self", "before",
                                                                      "after"])  # fmt: skip
    sums = {name: torch.zeros(H, dtype=torch.float64) for name in names}
    keys = torch.zeros(H, T, dtype=torch.float64)
    place = torch.arange(T)
    for at in range(0, len(sampled), step):
        rows = sampled[at : at + step]
        p = (_map(call, rows) if maps.full is None else maps.full[:, rows]).double()
        keys += p.sum(1)
        sums["entropy"] += torch.special.entr(p).sum((1, 2))
        if maps.kind != "cross":
            sums["distance"] += (p * (rows[:, None] - place).abs()).sum((1, 2))
            for name, shift in (("self", 0), ("before", -1), ("after", 1)):
                target = rows + shift
                there = (target >= 0) & (target < T)
                found = p[:, there].gather(2, target[there].expand(H, -1)[..., None])
                sums[name] += found.sum((1, 2))
    sums["first"] = keys[:, 0]
    maps.stat_rows = len(sampled)
    maps.statistics = {name: total / len(sampled) for name, total in sums.items()}
    maps.favourite_shares, maps.favourites = (keys / len(sampled)).topk(min(3, T))


def pooled_identity(count: int) -> Tensor:
    """[count, groups] of ones and zeros: the group each token is in, itself up to FULL tokens."""
    groups = count if count <= FULL else GRID
    edges = torch.arange(count) * groups // count
    return torch.nn.functional.one_hot(edges, groups).float()


class Rollout:
    """Attention rollout: R = (I + A_l) / 2 ... (I + A_1) / 2, A_l the mean of layer l's heads: how
    much of each place's state came from each place of the text. A times R is the attention with
    columns of R in the values' place, so no S x S matrix is made: the columns are tokens, above
    FULL tokens GRID groups of neighbours.

    Source: Abnar and Zuidema, arXiv 2005.00928.
    """

    def __init__(self):
        self.value: Tensor | None = None

    def add(self, call: Capture) -> None:
        args = call.args
        q, k = args["q"][:1], args["k"][:1]
        if self.value is None:
            self.value = pooled_identity(k.shape[2]).to(q.device)
        rest = [args[n] for n in ("mask", "slopes", "positions", "table", "lut")]
        numbers = [args[n] for n in _SHARED[5:]]
        parts = []
        for columns in self.value.split(64, 1):
            v = columns.to(q.dtype).expand(1, k.shape[1], *columns.shape).contiguous()
            out, _ = attention_fwd(
                q, k, v, *rest, None, None, None, numbers[0], numbers[1], 0.0, *numbers[2:]
            )
            parts.append(out[0].float().mean(0))
        self.value = (self.value + torch.cat(parts, 1)) / 2

    def table(self) -> Tensor | None:
        """[S,S] up to FULL tokens, else the mean over groups of rows [GRID,GRID]."""
        if self.value is None:
            return None
        S, groups = self.value.shape
        if groups == S:
            return self.value.cpu()
        return torch.nn.functional.adaptive_avg_pool2d(self.value[None, None], GRID)[0, 0].cpu()
