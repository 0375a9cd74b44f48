"""The page and the pictures of an Inspection, in a folder."""

import warnings
from pathlib import Path

from . import figures
from .inspection import Inspection
from .page import html

__all__ = ["write"]


def write(
    inspection: Inspection,
    folder: str | Path,
    *,
    layer: int | None = None,
    head: int | None = None,
) -> list[Path]:
    """index.html, and where matplotlib is installed attention.png (one head with its words),
    heads.png (the layer's heads side by side), cross.png (seq2seq), rollout.png, statistics.png,
    embedding.png and next.png (language models). layer, head: None is the last layer's
    first head.

    Returns the paths. Raises ValueError for a layer or head that is not there, and writes nothing.
    """
    page = html(inspection, layer=layer, head=head)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "index.html"]
    paths[0].write_text(page, encoding="utf-8")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return paths
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a word in a script of another font
        for name, figure in figures.figures(inspection, layer, head):
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130, facecolor="white")
    return paths
