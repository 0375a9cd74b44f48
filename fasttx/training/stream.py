"""A corpus as one row of token ids and the bounds of its documents."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .tokenizer import Tokenizer

__all__ = ["TokenStream"]

_BATCH, _CHARACTERS = 1024, 4 << 20


@dataclass(frozen=True)
class TokenStream:
    """ids int32 [N]; bounds int64 [D+1]: document d is ids[bounds[d]:bounds[d+1]]; words bool [N],
    True where a word begins, or None."""

    ids: np.ndarray
    bounds: np.ndarray
    words: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.bounds) - 1

    @classmethod
    def from_documents(
        cls, tokenizer: Tokenizer, documents: Iterable[str], *, words: bool = False
    ) -> "TokenStream":
        """The documents' tokens; a document without any is left out.

        words: also where words begin, as the tokenizer's pre-tokenizer has them.

        Raises ValueError where nothing is left.
        """
        ids, starts, lengths = [], [], []
        for batch in _batches(documents):
            for encoding in tokenizer.encode_batch(batch, words):
                if not encoding.ids:
                    continue
                ids.append(np.asarray(encoding.ids, np.int32))
                lengths.append(len(encoding.ids))
                if words:
                    word = np.asarray([-1 if w is None else w for w in encoding.word_ids])
                    starts.append(np.diff(word, prepend=-2) != 0)
        if not ids:
            raise ValueError("the text is empty: it holds no tokens")
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        return cls(np.concatenate(ids), bounds, np.concatenate(starts) if words else None)

    def joined(self, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> "TokenStream":
        """The same with these tokens around each document; each of them is a word."""
        lengths = np.diff(self.bounds) + len(before) + len(after)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        inside = np.ones(bounds[-1], bool)
        ids = np.empty(bounds[-1], np.int32)
        for shift, token in enumerate(before):
            ids[bounds[:-1] + shift], inside[bounds[:-1] + shift] = token, False
        for shift, token in enumerate(reversed(after), 1):
            ids[bounds[1:] - shift], inside[bounds[1:] - shift] = token, False
        ids[inside] = self.ids
        words = None
        if self.words is not None:
            words = np.ones(bounds[-1], bool)
            words[inside] = self.words
        return TokenStream(ids, bounds, words)

    def parted(self, share: float, seed: int = 0) -> tuple["TokenStream", "TokenStream"]:
        """(the rest, share of the documents chosen by seed), at least one document each."""
        if not 0 < share < 1 or self.documents < 2:
            raise ValueError(
                f"cannot part {share} of {self.documents} documents: give a share between 0 and 1 "
                "and two documents or more"
            )
        count = min(max(1, round(share * self.documents)), self.documents - 1)
        order = np.random.default_rng(seed).permutation(self.documents)
        return self._take(np.sort(order[count:])), self._take(np.sort(order[:count]))

    def _take(self, chosen: np.ndarray) -> "TokenStream":
        lengths = np.diff(self.bounds)[chosen]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        index = np.arange(bounds[-1]) + np.repeat(self.bounds[chosen] - bounds[:-1], lengths)
        return TokenStream(
            self.ids[index], bounds, None if self.words is None else self.words[index]
        )


def _batches(documents: Iterable[str]):
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == _BATCH or size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
