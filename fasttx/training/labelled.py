"""Texts with what a model shall say of them: a class, a class for every word, an answer's place."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .objectives import IGNORE, padded
from .tokenizer import Tokenizer

__all__ = ["AnswerSpans", "TextLabels", "WordLabels", "predict"]


class _Labelled:
    """Rows of token ids, and a label each; `name` of the texts in errors. segments: whether batches
    have token_type_ids."""

    name = "texts"

    def __init__(self, tokenizer: Tokenizer, texts: list, length: int, cut: bool):
        if tokenizer.pad is None:
            raise ValueError(f"{self.name} need a tokenizer with the token pad")
        if length < 3:
            raise ValueError(f"length must be at least 3, got {length}")
        if not texts:
            raise ValueError(f"{self.name}: there are none")
        self.tokenizer = tokenizer
        self.encodings = tokenizer.encode_inputs(texts, length)
        for i, encoding in enumerate(self.encodings):
            if not any(place is not None for place in encoding.word_ids):
                raise ValueError(f"{self.name}: number {i} is empty: {texts[i]!r}")
            if encoding.overflowing and not cut:
                raise ValueError(
                    f"{self.name}: number {i} has more than {length} tokens: {str(texts[i])[:60]!r}"
                )
        self.rows = [np.array(e.ids, np.int64) for e in self.encodings]
        self.types = [np.array(e.type_ids, np.int64) for e in self.encodings]
        self.segments = any(row.any() for row in self.types)
        self.labels: Sequence | None = None

    def _count(self, name: str, given: Sequence) -> None:
        if len(given) != len(self):
            raise ValueError(
                f"{name} must be as many as {self.name}, {len(self)}, got {len(given)}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices, epochs=0) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, S]; token_type_ids where the tokenizer tells two texts
        apart; labels where they are known."""
        which = [int(i) for i in indices]
        rows = [self.rows[i] for i in which]
        found = {
            "input_ids": padded(rows, self.tokenizer.pad),
            "attention_mask": padded([np.ones(len(row), np.int64) for row in rows], 0),
        }
        if self.segments:
            found["token_type_ids"] = padded([self.types[i] for i in which], 0)
        if self.labels is not None:
            found["labels"] = self._labels(which)
        return found

    def _labels(self, which: list[int]) -> Tensor:
        return torch.as_tensor(np.array([self.labels[i] for i in which]))


class TextLabels(_Labelled):
    """Examples for SequenceClassification: texts, and the class of each.

    Args:
        tokenizer: the model's, with pad; its template is put around each text.
        texts: str, or pairs of them. labels: a class, or numbers, for each; None to predict.
        length: the most tokens. cut: longer texts lose their end; otherwise they are refused.

    Raises:
        ValueError: no texts; an empty or too long one, named by its number; more or fewer labels.
    """

    def __init__(self, tokenizer: Tokenizer, texts, labels=None, length: int = 128, *, cut=False):
        super().__init__(tokenizer, list(texts), length, cut)
        if labels is not None:
            self._count("labels", labels)
            self.labels = labels


class WordLabels(_Labelled):
    """Examples for TokenClassification: sentences of words, and the class of each word, which is
    asked for at its first token; -100 for none.

    places: for each sentence, the token a word begins with, -1 where it has none (cut off, or of
    nothing the tokenizer keeps). Args and errors as TextLabels.
    """

    name = "sentences"

    def __init__(
        self, tokenizer: Tokenizer, sentences, labels=None, length: int = 128, *, cut=False
    ):
        sentences = [list(words) for words in sentences]
        for i, words in enumerate(sentences):
            if any(len(word.split()) != 1 for word in words):
                raise ValueError(f"sentences: number {i} has words that are empty or hold spaces")
        super().__init__(tokenizer, [" ".join(words) for words in sentences], length, cut)
        pairs = zip(sentences, self.encodings, strict=True)
        self.places = [_first_tokens(words, encoding) for words, encoding in pairs]
        if labels is None:
            return
        self._count("labels", labels)
        self.labels = []
        for i, (places, classes, row) in enumerate(
            zip(self.places, labels, self.rows, strict=True)
        ):
            if len(classes) != len(places):
                raise ValueError(
                    f"labels of sentence {i} must be {len(places)}, one a word, got {len(classes)}"
                )
            own = np.full(len(row), IGNORE, np.int64)
            own[places[places >= 0]] = np.asarray(classes)[places >= 0]
            self.labels.append(own)

    def _labels(self, which: list[int]) -> Tensor:
        return padded([self.labels[i] for i in which], IGNORE)


class AnswerSpans(_Labelled):
    """Examples for QuestionAnswering: questions, passages that answer them, and where.

    Args:
        spans: (first, end) of each answer in its passage, in characters, end excluded; None to
            predict. The others as TextLabels; a passage is cut, a question never.

    Raises:
        ValueError: as TextLabels; a span that holds no token of its passage, or one cut off.
    """

    name = "questions"

    def __init__(
        self,
        tokenizer: Tokenizer,
        questions: Sequence[str],
        passages: Sequence[str],
        spans: Sequence[tuple[int, int]] | None = None,
        length: int = 384,
        *,
        cut: bool = False,
    ):
        if len(questions) != len(passages):
            raise ValueError(
                f"passages must be as many as questions, {len(questions)}, got {len(passages)}"
            )
        super().__init__(tokenizer, list(zip(questions, passages, strict=True)), length, cut)
        self.passages = list(passages)
        if spans is None:
            return
        self._count("spans", spans)
        self.labels = []
        for i, (encoding, (first, end)) in enumerate(zip(self.encodings, spans, strict=True)):
            ends = [encoding.char_to_token(at, 1) for at in (first, end - 1)]
            if first >= end or None in ends:
                raise ValueError(
                    f"spans: ({first}, {end}) of question {i} holds no token of its passage, or "
                    f"one past {length} tokens: {self.passages[i][first:end]!r}"
                )
            self.labels.append(ends)

    def answer(self, index: int, logits: Tensor, longest: int = 30) -> tuple[int, int]:
        """(first, end), in characters of its passage, of the likeliest answer to question `index`
        of at most `longest` tokens; logits [S, 2] of QuestionAnswering."""
        encoding = self.encodings[index]
        inside = torch.tensor([side == 1 for side in encoding.sequence_ids])
        start, end = logits[: len(inside)].float().masked_fill(~inside[:, None], -torch.inf).T
        both = start[:, None] + end
        allowed = torch.ones_like(both, dtype=torch.bool).triu().tril(longest - 1)
        best = int(both.masked_fill(~allowed, -torch.inf).argmax())
        first, last = divmod(best, len(inside))
        return encoding.offsets[first][0], encoding.offsets[last][1]


def predict(model: nn.Module, examples, batch_size: int = 64) -> list[Tensor]:
    """The logits of every row, in evaluation mode and without gradients: [num_labels] of a text,
    [S, num_labels] of its tokens, without padding."""
    lengths = [len(row) for row in examples.rows]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    device = next(model.parameters()).device
    found, mode = {}, model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            which = order[start : start + batch_size]
            batch = examples.batch(which)
            batch.pop("labels", None)
            logits = model(**{k: v.to(device) for k, v in batch.items()}).logits
            for i, row in zip(which, logits, strict=True):
                found[i] = row[: lengths[i]] if row.dim() == 2 else row
    model.train(mode)
    return [found[i] for i in range(len(order))]


def _first_tokens(words: list[str], encoding) -> np.ndarray:
    """The token each word begins with, or -1: the first that has the word's characters."""
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    places = np.full(len(words), -1, np.int64)
    for token, (side, (_, end)) in enumerate(
        zip(encoding.sequence_ids, encoding.offsets, strict=True)
    ):
        if side is None or end == 0:
            continue
        word = int(np.searchsorted(starts, end - 1, side="right")) - 1
        if word < len(words) and places[word] < 0:
            places[word] = token
    return places
