"""The pictures: matplotlib figures of an Inspection, without a display."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .inspection import Inspection
from .maps import AttentionMaps
from .words import TEMPERATURES

__all__ = ["figures"]

_BLUE, _RED = "#0b5fb8", "#b3202c"
_NAMED = 48  # words up to which the axes carry them


def figures(inspection: Inspection, layer: int | None, head: int | None) -> Iterator[tuple]:
    """(name, matplotlib Figure) of each picture."""
    kind, layer, head = inspection.choose(layer, head)
    own = "decoder" if kind == "cross" else kind
    layers = inspection.layers(own)
    maps = layers[min(layer, len(layers) - 1)]
    yield "attention", _attention(inspection, maps, min(head, maps.heads - 1))
    yield "heads", _heads(maps)
    if kind == "cross":
        yield "cross", _attention(inspection, inspection.layers(kind)[layer], head)
    if own in inspection.rollout:
        yield "rollout", _rollout(inspection, own)
    yield "statistics", _statistics(inspection, own)
    yield "embedding", _embedding(inspection)
    if inspection.distributions:
        yield "next", _next(inspection)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _grid(maps: AttentionMaps) -> Tensor:
    return maps.pooled if maps.full is None else maps.full


def _words(inspection: Inspection, ids: list[int]) -> list[str]:
    # A dollar would begin mathematics, and a missing glyph only warns.
    words = [inspection.words[i].strip() or "␣" for i in ids]
    return [w.replace("\n", "↵").replace("$", r"\$")[:14] for w in words]


def _sides(inspection: Inspection, kind: str) -> tuple[list[int], list[int]]:
    queries = inspection.tokens if kind == "encoder" or not inspection.target else inspection.target
    return queries, inspection.tokens if kind == "cross" else queries


def _show(inspection, axes, table: Tensor, kind: str, whole: bool) -> None:
    axes.imshow(
        table.float().sqrt().numpy(), cmap="Blues", vmin=0, aspect="auto" if not whole else "equal"
    )
    queries, keys = _sides(inspection, kind)
    if whole and max(len(queries), len(keys)) <= _NAMED:
        axes.set_yticks(range(len(queries)), _words(inspection, queries), fontsize=8)
        axes.set_xticks(range(len(keys)), _words(inspection, keys), fontsize=8, rotation=90)
    elif not whole:
        axes.set_xlabel(f"{table.shape[1]} groups of {len(keys)} tokens")
        axes.set_ylabel(f"{table.shape[0]} groups of {len(queries)} tokens")


def _attention(inspection: Inspection, maps: AttentionMaps, head: int):
    layer = inspection.layers(maps.kind).index(maps)
    queries, keys = _sides(inspection, maps.kind)
    figure = _figure(11, 6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _show(inspection, left, _grid(maps)[head], maps.kind, maps.full is not None)
    left.set_title(f"{maps.kind}, layer {layer}, head {head}: row looks at column", fontsize=10)
    table = maps.exact[head] if maps.full is None else maps.full[head]
    table = table.double().clone()
    if maps.kind != "cross":
        table[torch.arange(len(maps.rows)), maps.rows] = 0
    for side, ids in ((0, [queries[r] for r in maps.rows]), (1, keys)):
        hidden = [i for i, token in enumerate(ids) if token in inspection.special]
        table.index_fill_(side, torch.tensor(hidden, dtype=torch.int64), 0)
    best = table.flatten().topk(min(14, table.numel()))
    q, k = _words(inspection, queries), _words(inspection, keys)
    pairs = [divmod(int(i), table.shape[1]) for i in best.indices]
    names = [f"{q[maps.rows[r]]} \N{RIGHTWARDS ARROW} {k[c]}" for r, c in pairs]
    right.barh(range(len(names)), best.values.tolist(), color=_BLUE)
    right.set_yticks(range(len(names)), names, fontsize=9)
    right.invert_yaxis()
    right.set_xlim(0, 1)
    right.set_title("strongest links between words", fontsize=10)
    return figure


def _heads(maps: AttentionMaps):
    columns = min(4, maps.heads)
    lines = -(-maps.heads // columns)
    figure = _figure(2.8 * columns, 3.1 * lines)
    for head in range(maps.heads):
        axes = figure.add_subplot(lines, columns, head + 1)
        axes.imshow(_grid(maps)[head].float().sqrt().numpy(), cmap="Blues", vmin=0, aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        words = f"head {head}: entropy {float(maps.statistics['entropy'][head]):.2f}"
        if "distance" in maps.statistics:
            words += f"\ndistance {float(maps.statistics['distance'][head]):.1f}"
        axes.set_title(words, fontsize=9)
    figure.suptitle(maps.name, fontsize=10)
    return figure


def _rollout(inspection: Inspection, kind: str):
    table = inspection.rollout[kind]
    figure = _figure(7, 6.5)
    axes = figure.add_subplot()
    _show(inspection, axes, table, kind, inspection.layers(kind)[0].full is not None)
    axes.set_title(f"rollout of the {kind}: what each place's state is made of", fontsize=10)
    return figure


def _statistics(inspection: Inspection, kind: str):
    layers = inspection.layers(kind)
    names = list(layers[0].statistics)
    figure = _figure(2.6 * len(names), 1.6 + 0.35 * len(layers))
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        table = torch.stack([m.statistics[name] for m in layers])
        figure.colorbar(axes.imshow(table.numpy(), cmap="viridis", aspect="auto", vmin=0), ax=axes)
        axes.set_title(name if name in ("entropy", "distance") else f"to {name}", fontsize=10)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _embedding(inspection: Inspection):
    found = inspection.space
    figure = _figure(8, 6.5)
    axes = figure.add_subplot(projection="3d")
    own = [i for i in found.points if i in set(found.ids)]
    near = [i for i in found.points if i not in set(found.ids)]
    for ids, colour in ((near, "#9aa3ad"), (own, _BLUE)):
        if ids:
            axes.scatter(*zip(*(found.points[i] for i in ids), strict=True), s=14, c=colour)
    for i, word in zip(own[:40], _words(inspection, own[:40]), strict=True):
        axes.text(*found.points[i], f" {word}", fontsize=8)
    for axis, share in zip("xyz", found.variance, strict=False):
        getattr(axes, f"set_{axis}label")(f"{100 * share:.1f} % of the variance", fontsize=8)
    axes.set_title("words of the text (blue) and their neighbours (grey)", fontsize=10)
    return figure


def _next(inspection: Inspection):
    shown = inspection.distributions[0 if inspection.masked else -1]
    ids = inspection.target or inspection.tokens
    words = _words(inspection, shown.ids[:12])
    figure = _figure(10, 5)
    left, right = figure.subplots(1, 2)
    left.barh(range(len(words)), shown.probabilities()[: len(words)], color=_BLUE)
    left.set_yticks(range(len(words)), words)
    left.invert_yaxis()
    place = _words(inspection, [ids[shown.place]])[0]
    left.set_title(f"{'at' if inspection.masked else 'after'} {place} ({shown.place})", fontsize=10)
    left.set_xlabel("probability at temperature 1")
    for i, word in enumerate(words[:6]):
        right.plot(TEMPERATURES, [shown.probabilities(t)[i] for t in TEMPERATURES], label=word)
    right.axvline(1, color=_RED, lw=0.8, ls=":")
    right.set_xlabel("temperature")
    right.set_ylim(0, 1.02)
    right.legend(fontsize=8)
    return figure
