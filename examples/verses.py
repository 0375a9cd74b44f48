"""Verses of Bibles in the public domain: King James and Reina-Valera 1909, out of SWORD modules.

A zText module has three files a testament (ot, nt): the compressed blocks (.bzz), an index of them
(.bzs: offset, size, size unpacked, as uint32) and one of the entries (.bzv: block, start as uint32,
length as uint16). The entries are in order: headings of module, testament, book and chapter, and
the verses between them; `<chapter osisID="Gen.1" sID=...>` in a heading says where one is.
"""

import html
import re
import struct
import zlib
from pathlib import Path

from packages import Unavailable, debian_file

__all__ = ["NEW_TESTAMENT", "Unavailable", "king_james", "read_ztext", "reina_valera"]

KING_JAMES = (
    "sword-text-kjv=14.3-1",
    "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
    "usr/share/sword/modules/texts/ztext/engKJV2006eb",
)
REINA_VALERA = (
    "sword-text-sparv=2.60-1",
    "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
    "usr/share/sword/modules/texts/ztext/spaRV1909eb",
)
NEW_TESTAMENT = (
    *("Matt", "Mark", "Luke", "John", "Acts", "Rom", "1Cor", "2Cor", "Gal", "Eph", "Phil", "Col"),
    *("1Thess", "2Thess", "1Tim", "2Tim", "Titus", "Phlm", "Heb", "Jas", "1Pet", "2Pet"),
    *("1John", "2John", "3John", "Jude", "Rev"),
)

Verses = dict[tuple[str, int, int], str]


def king_james() -> Verses:
    """{(book, chapter, verse): text}, 31102 of them; Unavailable where the package is."""
    return read_ztext(debian_file(*KING_JAMES))


def reina_valera() -> Verses:
    """Reina-Valera 1909 (Spanish) under King James' numbers; some verses are joined to others."""
    return read_ztext(debian_file(*REINA_VALERA))


def read_ztext(folder: Path) -> Verses:
    """The verses of a module in OSIS, in order, without headings, notes and marks."""
    verses = {}
    for testament in ("ot", "nt"):
        place = None
        for entry in _entries(folder, testament):
            if found := re.search(r'<chapter\b[^>]*\bosisID="(\w+)\.(\d+)" sID=', entry):
                place, number = (found[1], int(found[2])), 0
            elif re.search(r'<div\b[^>]*\bosisID="\w+" sID=', entry):
                place = None
            elif place:
                number += 1
                if text := _plain(entry):
                    verses[(*place, number)] = text
    return verses


def _entries(folder: Path, testament: str):
    blocks, index, packed = (
        (folder / f"{testament}.{kind}").read_bytes() for kind in ("bzs", "bzv", "bzz")
    )
    texts = [
        zlib.decompress(packed[start : start + size]) if size else b""
        for start, size, _ in struct.iter_unpack("<III", blocks)
    ]
    for block, start, length in struct.iter_unpack("<IIH", index):
        yield texts[block][start : start + length].decode() if length else ""


def _plain(entry: str) -> str:
    text = re.sub(r"<(note|title)\b.*?</\1>", "", entry, flags=re.DOTALL)
    text = re.sub(r"</?(?:w|transChange|divineName|seg|q|foreign)\b[^>]*>", "", text)
    text = re.sub(r"<[^>]*>|\\\w+", " ", text)  # some of USFM's marks (\nd) were left in King James
    text = html.unescape(text).replace("¶", "")
    return " ".join(text.split())
