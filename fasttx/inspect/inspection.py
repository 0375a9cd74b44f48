"""Looking at a model while it reads a text."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..training.tokenizer import Tokenizer, check_tokenizer
from .calls import Capture, capture
from .maps import FULL, AttentionMaps, Rollout, maps_of
from .subject import Subject
from .words import Distribution, Space, distribution, space

__all__ = ["Inspection", "look"]

LONGEST = 16384
_BYTES = 9 << 20  # of exact values on the page
_PLACES = 64  # places whose next token is shown


@dataclass
class Inspection:
    """What was seen.

    tokens, target: the ids of the text, and of what the decoder read (seq2seq), with their written
    forms in words; special: those that text does not hold, as [CLS]. maps: of each attention, in
    the order it ran. rollout: {"encoder": [S,S], "decoder": ...}, grids above 512 tokens.
    distributions: of the next token after each of the last 64 places, or of each masked one.
    speaks: whether the model has logits of words at all.
    """

    model: str
    text: str
    positions: str
    tokens: list[int]
    target: list[int]
    words: dict[int, str]
    special: frozenset[int]
    maps: list[AttentionMaps]
    rollout: dict[str, Tensor]
    space: Space
    speaks: bool
    masked: bool
    distributions: list[Distribution]

    def layers(self, kind: str) -> list[AttentionMaps]:
        """The maps of one kind, "encoder", "decoder" or "cross", first layer first."""
        return [m for m in self.maps if m.kind == kind]

    @property
    def kinds(self) -> list[str]:
        return [k for k in ("encoder", "decoder", "cross") if self.layers(k)]

    def choose(self, layer: int | None = None, head: int | None = None) -> tuple[str, int, int]:
        """(kind, layer, head) of the map to show first: the last of the last side, head 0.

        Raises ValueError for a layer or head that is not there.
        """
        kind = self.kinds[-1]
        layers = self.layers(kind)
        layer = len(layers) - 1 if layer is None else layer
        _within("layer", layer, len(layers))
        head = 0 if head is None else head
        _within("head", head, layers[layer].heads)
        return kind, layer, head


def look(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    *,
    target: str | None = None,
    rows: list[int] | None = None,
    layer: int | None = None,
    head: int | None = None,
    top_k: int = 20,
    max_new_tokens: int = 32,
) -> Inspection:
    """Run model once on text and keep what can be seen.

    Args:
        model: of fasttx.models, or of transformers after fasttx.patch; dropout is off meanwhile.
        tokenizer: the model's; special tokens in the text, as <mask>, are such.
        target: what a seq2seq model's decoder reads; None: what the model writes, greedily, at most
            max_new_tokens tokens.
        rows: above 512 tokens the query rows to keep exactly, negative ones from the end; None: 8
            evenly spaced ones, or as many as fit.
        layer, head: only checked, before the model runs: what write will be asked to show.
        top_k: how many of the next tokens.

    Raises:
        TypeError, ValueError: naming the argument, before the model runs: no tokens, more than the
            model has positions for or 16384, a row that is not there, more rows than a page holds.
            After it: the model ran no attention of fasttx.
        TokenizerMismatch: the model was trained with another tokenizer.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    if not text.strip():
        raise ValueError("text must not be empty")
    for name, value in (("top_k", top_k), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    subject = Subject(model)
    check_tokenizer(model, tokenizer)
    if target is not None and not subject.seq2seq:
        raise ValueError(f"target must be None for {type(model).__name__}: it has no decoder of it")
    ids = _tokens("text", text, tokenizer, subject)
    for name, value, count in (("layer", layer, subject.layers), ("head", head, subject.heads)):
        if value is not None:
            _within(name, value, count)
    chosen = _rows(rows, len(ids), subject.layers * subject.heads * len(ids))
    decoder = None
    if target is not None:
        own = _tokens("target", target, tokenizer, subject, decoder=True)
        decoder = [subject.start(), *own]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _look(subject, tokenizer, text, ids, decoder, chosen, top_k, max_new_tokens)
    finally:
        model.train(training)


def _look(subject, tokenizer, text, ids, decoder, rows, top_k, max_new_tokens) -> Inspection:
    source = torch.tensor(ids, device=subject.device)
    target = None
    if subject.seq2seq:
        if decoder is None:
            target = subject.write(source, max_new_tokens)
        else:
            target = torch.tensor(decoder, device=subject.device)
    maps, rollouts = [], {}

    def see(call: Capture) -> None:
        maps.append(maps_of(call, rows))
        if call.kind != "cross":
            rollouts.setdefault(call.kind, Rollout()).add(call)

    with capture(subject.model, see):
        hidden, logits = subject.run(source, target)
    if not maps:
        raise ValueError(
            f"model: no attention of fasttx ran in {type(subject.model).__name__}; a model of "
            "transformers needs fasttx.patch(model) first"
        )
    last = ids if target is None else target.tolist()
    distributions = []
    if subject.language and (places := _places(subject, tokenizer, last)):
        scores = subject.logits(hidden, logits, places)
        distributions = [
            distribution(place, row, top_k) for place, row in zip(places, scores, strict=True)
        ]
    found = space(subject.vocabulary, ids + (last if target is not None else []))
    seen = {*ids, *last, *found.points, *(i for d in distributions for i in d.ids)}
    return Inspection(
        model=type(subject.model).__name__,
        text=text,
        positions=subject.positions,
        tokens=ids,
        target=[] if target is None else last,
        words={i: _word(tokenizer, i) for i in sorted(seen)},
        special=frozenset(seen & tokenizer.special_ids),
        maps=maps,
        rollout={kind: r.table() for kind, r in rollouts.items()},
        space=found,
        speaks=subject.language,
        masked=subject.masked,
        distributions=distributions,
    )


def _tokens(name: str, text: str, tokenizer: Tokenizer, subject: Subject, decoder=False):
    ids = tokenizer.encode(text, special=True) if decoder else tokenizer.prompt(text)
    if not ids:
        raise ValueError(f"{name} must have a token, got {text[:40]!r}")
    limit = min(n for n in (LONGEST, subject.limit) if n is not None)
    if len(ids) + decoder > limit:
        why = "the model's positions" if limit != LONGEST else "the most that is shown"
        raise ValueError(
            f"{name} must have at most {limit} tokens, {why}, got {len(ids) + decoder}"
        )
    return ids


def _rows(rows: list[int] | None, count: int, size: int) -> list[int]:
    """size: bytes of one exact row of every head."""
    most = max(1, _BYTES // max(1, size))
    if rows is None:
        n = min(8, count, most)
        return sorted({round(i * (count - 1) / max(1, n - 1)) for i in range(n)})
    chosen = []
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, int):
            raise TypeError(f"rows must hold ints, got {row!r}")
        if not -count <= row < count:
            raise ValueError(f"rows must lie in [{-count}, {count}), the tokens, got {row}")
        chosen.append(row % count)
    chosen = sorted(set(chosen))
    if count > FULL and len(chosen) > most:
        raise ValueError(f"rows must be at most {most} for {count} tokens, got {len(chosen)}")
    return chosen


def _places(subject: Subject, tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    if subject.masked:
        return [i for i, token in enumerate(ids) if token == tokenizer.mask][:_PLACES]
    return list(range(max(0, len(ids) - _PLACES), len(ids)))


def _word(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is read: spaces shown, bytes that are no text as their name."""
    raw = tokenizer.backend.id_to_token(token)
    if raw is None:
        return f"[{token}]"
    if token in tokenizer.special_ids:
        return raw
    text = tokenizer.backend.decode([token], skip_special_tokens=False)
    visible = text.replace("\n", "").replace("\t", "").isprintable()
    if not text or "\ufffd" in text or not visible:
        return raw
    space = raw[:1] in ("Ġ", "▁") and not text.startswith(" ")
    return " " + text if space else text


def _within(name: str, value: int, count: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"{name} must lie in [0, {count}), got {value!r}")
