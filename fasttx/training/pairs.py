"""Texts and what is to be written for them: translations, summaries, spellings."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from .objectives import IGNORE, padded
from .text import check_files, lines
from .tokenizer import Tokenizer

__all__ = ["Pairs", "parted", "read_pairs"]


class Pairs:
    """Examples for a seq2seq model: [source, eos] and, as labels, [target, eos].

    Args:
        tokenizer: with pad and eos.
        pairs: (source, target) texts.
        length, target_length: the most tokens of each, eos included.
        cut: longer texts lose their end; otherwise they are refused.

    Raises:
        ValueError: no pairs; an empty source or target, or one too long, named by its number.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pairs: Iterable[tuple[str, str]],
        length: int = 128,
        target_length: int = 128,
        *,
        cut: bool = False,
    ):
        if tokenizer.pad is None or tokenizer.eos is None:
            raise ValueError("pairs need a tokenizer with the tokens pad and eos")
        for name, value in (("length", length), ("target_length", target_length)):
            if value < 2:
                raise ValueError(f"{name} must be at least 2, got {value}")
        self.tokenizer = tokenizer
        sides = list(zip(*pairs, strict=True)) or ((), ())
        self.sources = self._rows("source", sides[0], length - 1, cut)
        self.targets = self._rows("target", sides[1], target_length - 1, cut)
        if not self.sources:
            raise ValueError("pairs: there are none")

    def _rows(self, name: str, texts: tuple[str, ...], most: int, cut: bool) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch(list(texts))
        empty = [i for i, e in enumerate(encodings) if not e.ids]
        long = [] if cut else [i for i, e in enumerate(encodings) if len(e.ids) > most]
        for words, found in (("is empty", empty), (f"has more than {most} tokens", long)):
            if found:
                i = found[0]
                more = f", and {len(found) - 1} more" if len(found) > 1 else ""
                raise ValueError(f"pairs: the {name} of pair {i} {words}: {texts[i][:60]!r}{more}")
        return [np.array([*e.ids[:most], self.tokenizer.eos], np.int32) for e in encodings]

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, indices, epochs=0) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, S], labels [B, T], -100 at padding."""
        sources = [self.sources[int(i)] for i in indices]
        return {
            "input_ids": padded(sources, self.tokenizer.pad),
            "attention_mask": padded([np.ones(len(x), np.int64) for x in sources], 0),
            "labels": padded([self.targets[int(i)] for i in indices], IGNORE),
        }


def read_pairs(
    paths: str | Path | Iterable[str | Path], name: str = "pairs"
) -> list[tuple[str, str]]:
    """(source, target) of each line "source<TAB>target" of UTF-8 files; empty lines are left out.

    Raises:
        ValueError: as read_documents; for a line without a tab, with a second one or with nothing
            beside it, naming file and line; no pairs.
    """
    found = []
    for path in check_files(paths, name):
        for number, line in enumerate(lines(path), 1):
            sides = line.split("\t")
            if not line.strip():
                continue
            if len(sides) != 2 or not all(side.strip() for side in sides):
                raise ValueError(
                    f"{name}: {path}: line {number} must be source<TAB>target, got {line[:60]!r}"
                )
            found.append((sides[0], sides[1]))
    if not found:
        raise ValueError(f"{name}: there are no pairs")
    return found


def parted(pairs: list, share: float, seed: int = 0) -> tuple[list, list]:
    """(the rest, share of the pairs chosen by seed), at least one each; as TokenStream.parted."""
    if not 0 < share < 1 or len(pairs) < 2:
        raise ValueError(
            f"cannot part {share} of {len(pairs)} pairs: give a share between 0 and 1 and two "
            "pairs or more"
        )
    count = min(max(1, round(share * len(pairs))), len(pairs) - 1)
    order = np.random.default_rng(seed).permutation(len(pairs))
    return tuple([pairs[i] for i in np.sort(part)] for part in (order[count:], order[:count]))
