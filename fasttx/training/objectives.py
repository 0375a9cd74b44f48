"""What a model is trained to do: collators that cut a token stream into rows, hide some of it and
give batches of tensors that fasttx's models and transformers' take alike.

A row's noise is a function of (seed, epoch, index of the row): the same whatever the batch size,
the number of processes or where a run was interrupted. Labels are -100 where nothing is asked.
"""

from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .noise import infilling_spans, masked_positions, t5_counts, t5_spans
from .stream import TokenStream
from .tokenizer import Tokenizer

__all__ = [
    "IGNORE",
    "OBJECTIVES",
    "CausalLM",
    "Examples",
    "MaskedLM",
    "Objective",
    "SpanCorruption",
    "TextInfilling",
]

IGNORE = -100
LAYOUTS = ("rows", "flat")


@dataclass(frozen=True)
class Objective:
    """tokenizer; length: of a row, special tokens included."""

    tokenizer: Tokenizer = field(repr=False)
    length: int = 128
    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    whole_word: ClassVar[bool] = False

    def __post_init__(self):
        wrong = self.problems({f.name: getattr(self, f.name) for f in fields(self)})
        if wrong:
            raise ValueError("; ".join(wrong))
        missing = [role for role in self.needs if getattr(self.tokenizer, role) is None]
        if missing:
            raise ValueError(f"{self.name} needs a tokenizer with the tokens {', '.join(missing)}")

    @classmethod
    def problems(cls, given: dict) -> list[str]:
        """What is wrong with these values, each said with its name."""
        wrong = []
        for name, (low, high) in _RANGES.items():
            value = given.get(name)
            if value is None or name not in cls.__dataclass_fields__:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                wrong.append(f"{name} must be a number, got {value!r}")
            elif not low <= value <= high or (name == "length" and value != int(value)):
                wrong.append(f"{name} must be between {low} and {high}, got {value}")
        layout = given.get("layout")
        if layout is not None and "layout" in cls.__dataclass_fields__ and layout not in LAYOUTS:
            wrong.append(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        return wrong

    def examples(self, stream: TokenStream, seed: int = 0) -> "Examples":
        """The rows of a stream, to be asked for batches."""
        if self.whole_word and stream.words is None:
            raise ValueError(
                "whole_word needs to know where words begin: "
                "TokenStream.from_documents(..., words=True)"
            )
        return Examples(self, *self.rows(stream), seed)

    def rows(self, stream: TokenStream) -> tuple[TokenStream, np.ndarray]:
        """(the stream rows are cut from, their starts and ends [R, 2])."""
        return stream, cut(stream.bounds, self.length)

    def row(self, stream: TokenStream, start: int, stop: int, rng) -> dict[str, np.ndarray]:
        """One row's arrays, before padding."""
        raise NotImplementedError

    def collate(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """Rows padded to the longest: input_ids, attention_mask and labels [B, S], int64."""
        pad = self.tokenizer.pad
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": padded(ids, pad),
            "attention_mask": padded([np.ones(len(x), np.int64) for x in ids], 0),
            "labels": padded([row["labels"] for row in rows], IGNORE),
        }


@dataclass(frozen=True)
class MaskedLM(Objective):
    """BERT's masked language model: of `rate` of the tokens, 80 % become mask, 10 % a random token,
    10 % stay; labels are theirs. A row is [cls, up to length - 2 tokens of one document, sep].

    whole_word: words are chosen, not tokens. dynamic: other tokens each epoch (RoBERTa); otherwise
    the same ones every time. kept, replaced: the shares that stay and that become random.

    Source: Devlin et al., arXiv 1810.04805; Liu et al., 1907.11692 (dynamic masking).
    """

    rate: float = 0.15
    whole_word: bool = False
    dynamic: bool = True
    kept: float = 0.1
    replaced: float = 0.1
    name: ClassVar[str] = "masked_lm"
    needs: ClassVar[tuple[str, ...]] = ("pad", "mask", "cls", "sep")

    @classmethod
    def problems(cls, given):
        wrong = super().problems(given)
        if not wrong and given.get("kept", 0.1) + given.get("replaced", 0.1) > 1:
            wrong.append("kept and replaced must not be more than 1 together")
        return wrong

    def rows(self, stream):
        return stream, cut(stream.bounds, self.length - 2)

    def row(self, stream, start, stop, rng):
        ids = stream.ids[start:stop].astype(np.int64)
        words = stream.words[start:stop] if self.whole_word else None
        chosen = masked_positions(len(ids), self.rate, words, rng)
        labels = np.where(chosen, ids, IGNORE)
        fate = rng.random(len(ids))
        random = self.tokenizer.ordinary_ids
        random = random[rng.integers(len(random), size=len(ids))]
        ids = np.where(chosen & (fate >= self.kept + self.replaced), self.tokenizer.mask, ids)
        becomes = chosen & (fate >= self.kept) & (fate < self.kept + self.replaced)
        ids = np.where(becomes, random, ids)
        ends = np.array([IGNORE])
        return {
            "input_ids": np.concatenate([[self.tokenizer.cls], ids, [self.tokenizer.sep]]),
            "labels": np.concatenate([ends, labels, ends]),
        }


@dataclass(frozen=True)
class CausalLM(Objective):
    """Next-token prediction over documents packed into full rows, of which only the last may be
    short. Each document is [bos, its tokens, eos]; it goes on in the next row where it does not
    fit, and does not see the documents beside it. labels are the ids themselves, as models shift
    them, and -100 at the first token of each document and row, which nothing predicts.

    bos: put it before documents. layout: "rows", input_ids and position_ids [B, length] (positions
    begin again with each document: from these transformers keeps documents apart, without a cache);
    "flat", the same as [1, total] with cu_seq_lens_q, cu_seq_lens_k (int32 bounds of documents),
    max_length_q and max_length_k, as flash attention and fasttx.attention take them. packed=False:
    a row is one document or a part of it, padded, with attention_mask.
    """

    bos: bool = True
    packed: bool = True
    layout: str = "rows"
    name: ClassVar[str] = "causal_lm"
    needs: ClassVar[tuple[str, ...]] = ("pad", "eos")

    def __post_init__(self):
        super().__post_init__()
        if self.bos and self.tokenizer.bos is None:
            raise ValueError("causal_lm: bos=True needs a tokenizer with the token bos")

    def rows(self, stream):
        before = (self.tokenizer.bos,) if self.bos else ()
        stream = stream.joined(before, (self.tokenizer.eos,))
        bounds = stream.bounds[[0, -1]] if self.packed else stream.bounds
        return stream, cut(bounds, self.length)

    def row(self, stream, start, stop, rng):
        ids = stream.ids[start:stop].astype(np.int64)
        first, last = np.searchsorted(stream.bounds, [start + 1, stop])
        begins = np.concatenate([[start], stream.bounds[first:last]]) - start
        labels = ids.copy()
        labels[begins] = IGNORE
        positions = np.arange(len(ids)) - np.repeat(begins, np.diff(begins, append=len(ids)))
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "begins": begins}

    def collate(self, rows):
        if not self.packed:
            return super().collate(rows)
        if self.layout == "rows":
            longest = max(len(row["input_ids"]) for row in rows)
            return {
                "input_ids": padded([row["input_ids"] for row in rows], self.tokenizer.pad),
                "position_ids": torch.from_numpy(
                    np.stack([_positions(row["position_ids"], longest) for row in rows])
                ),
                "labels": padded([row["labels"] for row in rows], IGNORE),
            }
        lengths = [len(row["input_ids"]) for row in rows]
        before = np.cumsum(lengths) - lengths
        bounds = [row["begins"] + b for row, b in zip(rows, before, strict=True)]
        bounds = np.concatenate([*bounds, [sum(lengths)]]).astype(np.int32)
        longest = int(np.diff(bounds).max())
        names = ("input_ids", "position_ids", "labels")
        batch = {n: torch.from_numpy(np.concatenate([r[n] for r in rows]))[None] for n in names}
        bounds = torch.from_numpy(bounds)
        packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return batch | packing | {"max_length_q": longest, "max_length_k": longest}


@dataclass(frozen=True)
class SpanCorruption(Objective):
    """T5's: round(n density) tokens in spans of `mean_span` on average; the input has a sentinel in
    the place of each, the target the sentinels each followed by its span; both end in eos. A row is
    as many tokens of one document as make an input of `length`.

    Source: Raffel et al., arXiv 1910.10683, section 3.1.4.
    """

    density: float = 0.15
    mean_span: float = 3.0
    name: ClassVar[str] = "span_corruption"
    needs: ClassVar[tuple[str, ...]] = ("pad", "eos")

    def __post_init__(self):
        super().__post_init__()
        _, spans = t5_counts(self.span_length, self.density, self.mean_span)
        if spans > len(self.tokenizer.sentinels):
            raise ValueError(
                f"span_corruption: rows of length {self.length} have {spans} spans, and the "
                f"tokenizer has {len(self.tokenizer.sentinels)} sentinels <extra_id_0>, ...: train "
                "it with sentinels, or make length or density smaller or mean_span larger"
            )

    @property
    def span_length(self) -> int:
        """The most tokens whose input fits `length`."""
        n = 1
        while self._input_length(n + 1) <= self.length:
            n += 1
        return n

    def _input_length(self, n: int) -> int:
        noise, spans = t5_counts(n, self.density, self.mean_span)
        return n - noise + spans + 1

    def rows(self, stream):
        return stream, cut(stream.bounds, self.span_length)

    def row(self, stream, start, stop, rng):
        ids = stream.ids[start:stop].astype(np.int64)
        noise = t5_spans(len(ids), self.density, self.mean_span, rng)
        return {
            "input_ids": self._with_sentinels(ids, noise),
            "labels": self._target(ids, noise),
        }

    def _with_sentinels(self, ids, noise):
        first = noise & ~np.concatenate([[False], noise[:-1]])
        sentinels = np.asarray(self.tokenizer.sentinels, np.int64)
        ids = ids.copy()
        ids[first] = sentinels[: first.sum()]
        return np.append(ids[first | ~noise], self.tokenizer.eos)

    def _target(self, ids, noise):
        first = np.flatnonzero(noise & ~np.concatenate([[False], noise[:-1]]))
        before = np.searchsorted(np.flatnonzero(noise), first)
        sentinels = self.tokenizer.sentinels[: len(first)]
        return np.append(np.insert(ids[noise], before, sentinels), self.tokenizer.eos)


@dataclass(frozen=True)
class TextInfilling(Objective):
    """BART's denoising: spans of Poisson(mean_span) tokens, `rate` of them in all, become one mask
    each; a span of none puts a mask in. The target is the whole text. A row is [bos, up to
    length - 2 tokens of one document, eos].

    Source: Lewis et al., arXiv 1910.13461, section 2.2 (text infilling).
    """

    rate: float = 0.3
    mean_span: float = 3.0
    name: ClassVar[str] = "text_infilling"
    needs: ClassVar[tuple[str, ...]] = ("pad", "bos", "eos", "mask")

    def rows(self, stream):
        return stream, cut(stream.bounds, self.length - 2)

    def row(self, stream, start, stop, rng):
        ids = stream.ids[start:stop].astype(np.int64)
        starts, lengths = infilling_spans(len(ids), self.rate, self.mean_span, rng)
        hidden = np.zeros(len(ids), bool)
        for begin, length in zip(starts, lengths, strict=True):
            hidden[begin : begin + length] = True
        kept_before = starts - np.cumsum(lengths) + lengths
        corrupted = np.insert(ids[~hidden], kept_before, self.tokenizer.mask)
        ends = [self.tokenizer.bos], [self.tokenizer.eos]
        return {
            "input_ids": np.concatenate([ends[0], corrupted, ends[1]]),
            "labels": np.concatenate([ends[0], ids, ends[1]]),
        }


OBJECTIVES = {c.name: c for c in (MaskedLM, CausalLM, SpanCorruption, TextInfilling)}
_RANGES = {
    "length": (4, 1 << 20),
    "rate": (1e-6, 0.9),
    "density": (1e-6, 0.9),
    "mean_span": (1.0, 1000.0),
    "kept": (0.0, 1.0),
    "replaced": (0.0, 1.0),
}


class Examples:
    """The rows of a stream under an objective."""

    def __init__(self, objective: Objective, stream: TokenStream, spans: np.ndarray, seed: int = 0):
        self.objective, self.stream, self.spans, self.seed = objective, stream, spans, seed
        self.dynamic = getattr(objective, "dynamic", True)

    def __len__(self) -> int:
        return len(self.spans)

    def batch(self, indices, epochs=0) -> dict[str, Tensor]:
        """The rows of these indices, with the noise of this epoch, or of one epoch for each."""
        epochs = np.broadcast_to(epochs if self.dynamic else 0, len(indices))
        rows = []
        for i, epoch in zip(indices, epochs, strict=True):
            rng = np.random.default_rng([self.seed, int(epoch), int(i)])
            rows.append(self.objective.row(self.stream, *self.spans[i], rng))
        return self.objective.collate(rows)


def cut(bounds: np.ndarray, size: int) -> np.ndarray:
    """Starts and ends [R, 2] of documents in pieces of at most `size`, in order."""
    lengths = np.diff(bounds)
    pieces = -(-lengths // size)
    which = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(bounds[:-1], pieces) + which * size
    return np.stack([starts, np.minimum(starts + size, np.repeat(bounds[1:], pieces))], 1)


def padded(rows: list[np.ndarray], value: int) -> Tensor:
    """int64 [B, longest]."""
    out = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def _positions(positions: np.ndarray, length: int) -> np.ndarray:
    """Padding after a short row is a document of its own."""
    return np.concatenate([positions, np.arange(length - len(positions))])
