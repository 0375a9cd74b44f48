"""Tokens as points of the embedding space, and as outcomes with probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TEMPERATURES", "Distribution", "Space", "distribution", "space"]

TEMPERATURES = tuple(round(0.1 * i, 1) for i in range(1, 21))
_WORDS = 200  # different tokens of the text that are looked up


@dataclass
class Space:
    """ids [n]: tokens of the text, each once, in its order; near [n,k] and cosine [n,k]: the tokens
    nearest by angle; points: {id: (x, y, z)}, of all of these, along the three principal axes of
    the whole table; variance: the share of the table's variance each axis holds."""

    ids: list[int]
    near: Tensor
    cosine: Tensor
    points: dict[int, tuple[float, float, float]]
    variance: list[float]


def space(table: Tensor, ids: list[int], count: int = 8) -> Space:
    """table [V,width], ids of a text. The angle is between the rows as they are."""
    table = table.detach().float().cpu()
    V, width = table.shape
    unique = list(dict.fromkeys(ids))[:_WORDS]
    centre = table.mean(0)
    # The axes from the width x width covariance: no centred copy of a large table is decomposed.
    spread = (table.T @ table / V - torch.outer(centre, centre)).double()
    values, vectors = torch.linalg.eigh(spread)
    axes = vectors[:, -3:].flip(1).float()
    axes = axes * torch.where(axes.abs().max(0).values == axes.max(0).values, 1.0, -1.0)
    share = values.clamp_min(0).flip(0)[:3] / values.clamp_min(0).sum().clamp_min(1e-30)
    length = table.norm(dim=1).clamp_min(1e-30)
    chosen = torch.tensor(unique)
    cosine = (table[chosen] @ table.T) / length[chosen, None] / length
    cosine[torch.arange(len(unique)), chosen] = -2.0
    cosine, near = cosine.topk(min(count, V - 1), -1)
    every = list(dict.fromkeys(unique + near.flatten().tolist()))
    places = (table[torch.tensor(every)] - centre) @ axes
    if width < 3:
        places = torch.nn.functional.pad(places, (0, 3 - places.shape[1]))
    points = dict(zip(every, map(tuple, places.tolist()), strict=True))
    return Space(unique, near, cosine.clamp(-1, 1), points, share.tolist())


@dataclass
class Distribution:
    """Of one place: ids and logits of the k most probable tokens, and log sum exp(logits / t) over
    the whole vocabulary for each t of TEMPERATURES."""

    place: int
    ids: list[int]
    logits: list[float]
    normalizers: list[float]

    def probabilities(self, temperature: float = 1.0) -> list[float]:
        """exp(logit / t) / sum over the vocabulary; t one of TEMPERATURES."""
        at = TEMPERATURES.index(temperature)
        scaled = torch.tensor(self.logits, dtype=torch.float64) / temperature
        return (scaled - self.normalizers[at]).exp().tolist()


def distribution(place: int, logits: Tensor, count: int) -> Distribution:
    logits = logits.double()
    top, ids = logits.topk(min(count, len(logits)))
    normalizers = [float(torch.logsumexp(logits / t, 0)) for t in TEMPERATURES]
    return Distribution(place, ids.tolist(), top.tolist(), normalizers)
