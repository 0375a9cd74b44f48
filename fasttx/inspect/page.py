"""An Inspection as one HTML page that loads nothing."""

import base64
import html as markup
import json
from importlib import resources

import torch
from torch import Tensor

from .inspection import Inspection
from .maps import GRID, LINKS, AttentionMaps
from .words import TEMPERATURES

__all__ = ["LARGEST", "html"]

LARGEST = 20 * 10**6  # bytes of a page
_WHOLE = 9 << 20  # cells of whole maps on a page; beyond, the strongest links of every row


def html(inspection: Inspection, *, layer: int | None = None, head: int | None = None) -> str:
    """The page, at most 20 MB; layer, head: of the map that is shown first.

    Probabilities are stored as round(255 sqrt(p)): off by at most sqrt(p) / 255.
    Raises ValueError for a layer or head that is not there, and for a model of so many heads that
    its page would be larger.
    """
    kind, layer, head = inspection.choose(layer, head)
    cells = sum(m.full.numel() for m in inspection.maps if m.full is not None)
    rows = sum(m.heads * m.queries for m in inspection.maps if m.full is not None)
    links = 0 if cells <= _WHOLE else max(1, min(LINKS, _WHOLE // (3 * rows)))
    pieces = {
        "words": {str(i): word for i, word in inspection.words.items()},
        "tokens": inspection.tokens,
        "target": inspection.target,
        "special": sorted(inspection.special),
        "facts": _facts(inspection),
        "first": {"kind": kind, "layer": layer, "head": head},
        "layers": {k: [_layer(m, links) for m in inspection.layers(k)] for k in inspection.kinds},
        "rollout": {k: _rollout(inspection, k) for k in inspection.rollout},
        "speaks": inspection.speaks,
        "masked": inspection.masked,
        "temperatures": TEMPERATURES,
        "distributions": [vars(d) for d in inspection.distributions],
        "space": _space(inspection),
    }
    data = json.dumps(pieces, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("page.template.html").read_text("utf-8")
    text = inspection.text if len(inspection.text) <= 100 else inspection.text[:99] + "…"
    title = markup.escape(f"{inspection.model}: {text}")
    page = template.replace("{{title}}", title).replace("{{data}}", data)
    if (size := len(page.encode())) > LARGEST:
        raise ValueError(
            f"model: its page would have {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}; give "
            "fewer rows or a shorter text"
        )
    return page


def _facts(inspection: Inspection) -> str:
    heads = {k: inspection.layers(k) for k in inspection.kinds}
    sides = ", ".join(f"{k}: {len(m)} layers of {m[0].heads} heads" for k, m in heads.items())
    count = f"{len(inspection.tokens)} tokens"
    if inspection.target:
        count += f", the decoder read {len(inspection.target)}"
    return f"{count}. {sides}. Positions: {inspection.positions}."


def _layer(maps: AttentionMaps, links: int) -> dict:
    piece = {
        "name": maps.name,
        "S": maps.queries,
        "T": maps.keys,
        "heads": maps.heads,
        "stat_rows": maps.stat_rows,
        "statistics": {n: _rounded(v) for n, v in maps.statistics.items()},
        "favourites": maps.favourites.tolist(),
        "shares": [_rounded(v) for v in maps.favourite_shares],
    }
    if maps.full is not None and not links:
        return piece | {"full": _packed(maps.full)}
    if maps.full is not None:
        k = min(links, maps.keys)
        values, keys = maps.full.topk(k, -1)
        grid = min(GRID, maps.queries, maps.keys)
        pooled = torch.nn.functional.adaptive_avg_pool2d(maps.full, grid)
        numbers = base64.b64encode(keys.numpy().astype("<u2").tobytes()).decode()
        piece |= {"k": k, "keys": numbers, "values": _packed(values)}
        return piece | {"grid": grid, "pooled": _packed(pooled)}
    piece |= {"rows": maps.rows.tolist(), "exact": _packed(maps.exact)}
    return piece | {"grid": GRID, "pooled": _packed(maps.pooled)}


def _rollout(inspection: Inspection, kind: str) -> dict:
    table, first = inspection.rollout[kind], inspection.layers(kind)[0]
    piece = {"S": first.queries, "T": first.keys, "heads": 1}
    if first.full is not None:
        return piece | {"full": _packed(table)}
    return piece | {"grid": GRID, "pooled": _packed(table), "rows": []}


def _space(inspection: Inspection) -> dict:
    found = inspection.space
    return {
        "ids": found.ids,
        "near": found.near.tolist(),
        "cosine": [_rounded(v) for v in found.cosine],
        "points": {str(i): [round(x, 4) for x in p] for i, p in found.points.items()},
        "variance": found.variance,
    }


def _packed(p: Tensor) -> str:
    """Probabilities as bytes round(255 sqrt(p)), in base64."""
    values = (p.float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 5) for v in values.tolist()]
