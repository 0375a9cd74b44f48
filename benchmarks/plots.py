"""PNG plots: ratios as bars on a log axis around 1, rates against sizes on doubling axes."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .rows import Row, Run

COLORS = {"fasttx": "#0b6bcb", "sdpa": "#d9730d", "eager": "#8a8a8a", "torch_compile": "#2a9d5c"}
OTHER = "#9b59b6"
COLORS |= {
    "fasttx_models": "#3f95e8",
    "fasttx_unpad": "#3f95e8",
    "fasttx_nn": "#3f95e8",
    "torch_nn": "#d9730d",
}
COLORS |= {"onnxruntime": "#b5487d", "ctranslate2": "#b5487d"}
BASES = {
    "op": "PyTorch",
    "model": "transformers with SDPA",
    "layer": "transformers' layer",
    "train": "the same script on transformers",
    "generate": "transformers, dynamic cache",
}
THEMES = {
    "light": {"ink": "#1c2024", "grid": "#d5d9de", "paper": "#ffffff"},
    "dark": {"ink": "#e6e8eb", "grid": "#3a4048", "paper": "#16191d"},
}
MAX_BARS = 36


def write_all(run: Run, folder: Path, theme: str = "light") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if theme == "light" else f"-{theme}"
    written = []
    for kind in BASES:
        rows = [row for row in run.rows if row.kind == kind and row.ours]
        rows = [row for row in rows if row.ratio is not None]
        if rows:
            written.append(ratio_plot(rows, folder / f"ratios-{kind}{suffix}.png", theme))
    rated = [row for row in run.rows if row.kind == "op" and row.rate and "queries" in row.shape]
    if rated:
        written.append(rate_plot(rated, folder / f"rates{suffix}.png", theme))
    return written


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _dress(axes, theme: str, grid: str) -> None:
    colors = THEMES[theme]
    axes.set_facecolor(colors["paper"])
    axes.tick_params(colors=colors["ink"], which="both", length=0, labelsize=8)
    axes.grid(True, axis=grid, color=colors["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(colors["ink"])


def _ticks_around_one(low: float, high: float) -> list[float]:
    steps = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100]
    return [step for step in steps if low <= step <= high]


def ratio_plot(rows: list[Row], path: Path, theme: str = "light") -> Path:
    """fasttx against SDPA, a bar a case; losses go to the left of 1, in another colour."""
    plt = _pyplot()
    every = len(rows)
    if every > MAX_BARS:  # its variants are in the table
        rows = [row for row in rows if row.provider == "fasttx"] or rows
    rows = rows[:MAX_BARS]
    left_out = every - len(rows)
    colors = THEMES[theme]
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.27 * len(rows)), layout="constrained")
    figure.set_facecolor(colors["paper"])
    reached = [row.ratio_low for row in rows] + [row.ratio_best or 1.0 for row in rows]
    low = min(0.8, *reached) * 0.92
    high = max(1.25, *(row.ratio_high for row in rows)) * 1.12
    axes.set_xscale("log")
    for i, row in enumerate(rows):
        color = COLORS.get(row.provider, COLORS["fasttx"]) if row.ratio >= 1 else "#c62f3b"
        axes.barh(i, row.ratio - 1, left=1, height=0.66, color=color)
        axes.plot([row.ratio_low, row.ratio_high], [i, i], color=colors["ink"], linewidth=1.2)
        if row.ratio_best is not None:
            axes.plot(row.ratio_best, i, "D", color="#f2b705", markeredgecolor="#000", markersize=4)
        end = max(row.ratio_high, 1.0)
        axes.text(end * 1.02, i, f"{row.ratio:.2f}x", va="center", fontsize=8, color=colors["ink"])
    axes.axvline(1, color=colors["ink"], linewidth=1)
    axes.set_xlim(low, high * 1.08)
    ticks = _ticks_around_one(low, high)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    names = [f"{row.case}  {row.dtype} {row.direction}, {row.threads} thr." for row in rows]
    several = {row.label for row in rows}
    if len(several) > 1:
        names = [f"{name}  {row.label}" for name, row in zip(names, rows, strict=True)]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    more = f" ({left_out} rows more in the table)" if left_out else ""
    base = "the other commit" if rows[0].ratio_to == "base" else BASES[rows[0].kind]
    title = f"How many times faster than {base}; diamond: than the best other{more}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=colors["ink"])
    _dress(axes, theme, "x")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def rate_plot(rows: list[Row], path: Path, theme: str = "light") -> Path:
    """GFLOP/s of every provider against the number of queries, a panel a dtype and direction."""
    plt = _pyplot()
    colors = THEMES[theme]
    panels = sorted({(row.direction, row.dtype) for row in rows}, reverse=True)
    columns = min(2, len(panels))
    lines = (len(panels) + columns - 1) // columns
    figure, grid = plt.subplots(
        lines, columns, figsize=(9, 3.1 * lines), squeeze=False, layout="constrained"
    )
    figure.set_facecolor(colors["paper"])
    for axes, (direction, dtype) in zip(grid.flat, panels, strict=False):
        shown = [row for row in rows if (row.direction, row.dtype) == (direction, dtype)]
        _rate_panel(axes, shown, theme)
        title = f"{dtype} {direction}"
        axes.set_title(title, loc="left", fontsize=10, color=colors["ink"])
        _dress(axes, theme, "both")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    named = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    legend = figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    for text in legend.get_texts():
        text.set_color(colors["ink"])
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _rate_panel(axes, rows: list[Row], theme: str) -> None:
    sizes = sorted({row.shape["queries"] for row in rows})
    by_provider = sorted(
        rows, key=lambda row: list(COLORS).index(row.provider) if row.provider in COLORS else 99
    )
    for provider, group in groupby(by_provider, key=lambda row: row.provider):
        group = sorted(group, key=lambda row: row.shape["queries"])
        label = group[0].label
        color = COLORS.get(provider, OTHER)
        points = [(row.shape["queries"], row.rate / 1e9) for row in group]
        axes.scatter(*zip(*points, strict=True), color=color, s=22, label=label, zorder=3)
        if len(sizes) > 1:
            best = {}
            for x, y in points:
                best[x] = max(best.get(x, 0), y)
            axes.plot(list(best), list(best.values()), color=color, linewidth=1, alpha=0.6)
    limit = [row.rate / row.share / 1e9 for row in rows if row.share]
    if limit:
        axes.axhline(max(limit), color=THEMES[theme]["ink"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            "machine's limit", (sizes[0], max(limit)), fontsize=7, color=THEMES[theme]["ink"],
            xytext=(0, 3), textcoords="offset points",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("queries S", fontsize=8)
    axes.set_ylabel("GFLOP/s (visible pairs)", fontsize=8)
