"""Tokenizers of the `tokenizers` library: trained on one's text, kept beside the model, and known
again by it."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

__all__ = ["KINDS", "Tokenizer", "TokenizerMismatch", "check_tokenizer", "train_tokenizer"]

KINDS = ("bpe", "wordpiece", "unigram", "word", "char")
TEMPLATES = {
    "none": None,
    "bos": "{bos} $A",
    "eos": "$A {eos}",
    "bos_eos": "{bos} $A {eos}",
}
# What Hugging Face folders call the special tokens, and what they are here.
ROLES = {
    "pad": "pad_token",
    "bos": "bos_token",
    "eos": "eos_token",
    "unk": "unk_token",
    "mask": "mask_token",
    "cls": "cls_token",
    "sep": "sep_token",
}
SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
FINGERPRINT = "tokenizer_fingerprint"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class TokenizerMismatch(ValueError):
    """The model was trained with another tokenizer."""


class Tokenizer:
    """A tokenizers.Tokenizer and what its special tokens are for.

    backend: the tokenizers.Tokenizer. special: token by role (pad, bos, eos, unk, mask, cls, sep);
    cls and sep are bos and eos unless given. The attributes of these names are ids, or None;
    sentinels are the ids of <extra_id_0>, <extra_id_1>, ...
    """

    def __init__(self, backend, special: dict[str, str] | None = None):
        self.backend, self.special = backend, dict(special or {})
        if unknown := set(self.special) - set(ROLES):
            raise ValueError(f"special: unknown {_listed(unknown)}; allowed: {', '.join(ROLES)}")
        for role, token in self.special.items():
            if backend.token_to_id(token) is None:
                raise ValueError(f"special: {role} {token!r} is not in the vocabulary")
        for role in ROLES:
            setattr(self, role, self._id(role))
        self.cls = self.bos if self.cls is None else self.cls
        self.sep = self.eos if self.sep is None else self.sep
        self.bos = self.cls if self.bos is None else self.bos
        self.eos = self.sep if self.eos is None else self.eos
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        found = ((re.fullmatch(r"<extra_id_(\d+)>", t), i) for t, i in vocabulary.items())
        numbered = sorted((int(m[1]), i) for m, i in found if m)
        self.sentinels = tuple(i for _, i in numbered)

    def _id(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def special_ids(self) -> frozenset[int]:
        """What never comes out of text: special tokens and sentinels."""
        added = self.backend.get_added_tokens_decoder().items()
        named = (getattr(self, role) for role in ROLES)
        return frozenset(
            [i for i, token in added if token.special] + [i for i in named if i is not None]
        ) | set(self.sentinels)

    @functools.cached_property
    def ordinary_ids(self) -> np.ndarray:
        """int64, ascending: every id that text may become."""
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        return np.array(sorted(set(ids) - self.special_ids), np.int64)

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides which ids a text becomes: normalizer, pre-tokenizer, model, added
        tokens. Padding, truncation and templates do not count, nor does the last digit of a score,
        which the library does not keep."""
        whole = json.loads(self.backend.to_str(), parse_float=lambda x: f"{float(x):.6g}")
        parts = {name: whole[name] for name in ("normalizer", "pre_tokenizer", "model")}
        parts["added"] = sorted([t["id"], t["content"]] for t in whole["added_tokens"])
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text, none added around it. special: <mask> in the text is the token and
        not six characters."""
        return self._ready(special).encode(text, add_special_tokens=False).ids

    def prompt(self, text: str) -> list[int]:
        """The ids of a text as a model is given it: with what the tokenizer's template puts around
        it; special tokens in the text are such."""
        return self._ready(special=True).encode(text).ids

    def encode_batch(self, texts: list[str], words: bool = False) -> list:
        """The tokenizers.Encoding of each text, as encode; with word_ids if `words`."""
        backend = self._ready()
        run = backend.encode_batch if words else backend.encode_batch_fast
        return run(texts, add_special_tokens=False)

    def encode_inputs(self, texts: list, length: int | None = None) -> list:
        """The tokenizers.Encoding of each text, or pair of texts, as prompt: within the tokenizer's
        template, but special tokens in a text are its characters. At most `length` tokens: the end
        of a text, of a pair's second one, goes into `overflowing`."""
        backend = self._ready()
        if length is not None:
            pairs = any(not isinstance(text, str) for text in texts)
            backend.enable_truncation(length, strategy="only_second" if pairs else "longest_first")
        return backend.encode_batch(texts)

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def _ready(self, special: bool = False):
        self.backend.encode_special_tokens = not special
        self.backend.no_truncation()
        self.backend.no_padding()
        return self.backend

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers' and
        tokenizers' from_pretrained read them. Each is replaced whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {ROLES[role]: token for role, token in self.special.items()}
        extra = [self.backend.id_to_token(i) for i in self.sentinels]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        config["clean_up_tokenization_spaces"] = False
        if extra:
            config["extra_special_tokens"] = extra
            names["additional_special_tokens"] = extra
        texts = (
            self.backend.to_str(pretty=True),
            json.dumps(config, indent=2, ensure_ascii=False),
            json.dumps(names, indent=2, ensure_ascii=False),
        )
        for name, text in zip(_FILES, texts, strict=True):
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a folder: one that save wrote, or any Hugging Face folder with a
        tokenizer.json; where that is missing (vocab.txt, spiece.model, ...) transformers makes it.

        Raises ValueError naming the file that is missing or damaged.
        """
        import tokenizers

        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"tokenizer: {folder} is not a folder")
        path = folder / "tokenizer.json"
        if not path.is_file():
            return _by_transformers(folder)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: {path} cannot be read: {error}") from None
        return cls(backend, _special_of(folder, backend))


def _special_of(folder: Path, backend) -> dict[str, str]:
    """special_tokens_map.json, then tokenizer_config.json, then the ids of config.json."""
    special = {}
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"tokenizer: {path} cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"tokenizer: {path} must hold a mapping")
        for role, key in ROLES.items():
            token = found.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if name == "config.json" and isinstance(index := found.get(f"{key}_id"), int):
                token = backend.id_to_token(index) if index >= 0 else None
            if isinstance(token, str) and backend.token_to_id(token) is not None:
                special[role] = token
    return special


def _by_transformers(folder: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            f"tokenizer: {folder} has no tokenizer.json; install transformers to convert its files"
        ) from None
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = found.backend_tokenizer
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"tokenizer: {folder} has no tokenizer.json, and transformers makes none of it: "
            f"{words[0]}"
        ) from None
    special = {role: getattr(found, key, None) for role, key in ROLES.items()}
    return Tokenizer(backend, {role: str(token) for role, token in special.items() if token})


def train_tokenizer(
    kind: str,
    documents: Iterable[str],
    vocab_size: int = 8000,
    *,
    lowercase: bool = False,
    min_frequency: int = 2,
    sentinels: int = 0,
    special: dict[str, str] | None = None,
    template: str = "none",
) -> Tokenizer:
    """A tokenizer trained on the documents.

    Args:
        kind: "bpe" (byte-level: knows every text), "wordpiece" (BERT's words and punctuation),
            "unigram" (sentencepiece's), "word" (words and punctuation whole) or "char".
        documents: texts, read once.
        vocab_size: all tokens but the sentinels; fewer where the text has no more.
        lowercase: the text, first. min_frequency: of a merge or a word.
        sentinels: how many of <extra_id_0>, ... span corruption may use; their ids come last.
        special: token by role, in the place of <pad>, <s> (bos), </s> (eos), <unk>, <mask>; cls
            and sep may be added.
        template: what prompt, and transformers, put around a text: "none", "bos", "eos" or
            "bos_eos".

    Raises:
        ValueError: naming the argument, or that the documents hold no text.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = SPECIAL | (special or {})
    tokens = list(dict.fromkeys(special.values()))
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    least = len(tokens) + (256 if kind == "bpe" else 1)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least} for {kind} (special tokens and alphabet), got "
            f"{vocab_size}"
        )
    for name, value, low in (("min_frequency", min_frequency, 1), ("sentinels", sentinels, 0)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    common = {"vocab_size": vocab_size, "special_tokens": tokens, "show_progress": False}
    counted = common | {"min_frequency": min_frequency}
    unknown = {"unk_token": special["unk"]}
    lower = [normalizers.Lowercase()] if lowercase else []
    if kind == "bpe":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(**counted, initial_alphabet=alphabet)
    elif kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece(**unknown))
        lower = [normalizers.BertNormalizer(lowercase=lowercase)]
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**counted)
    elif kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        lower = [normalizers.NFKC(), *lower]
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        # The model would find in text any special token of its own vocabulary: it has one alone.
        common["special_tokens"] = [special["unk"]]
        common["vocab_size"] -= len(tokens) - 1
        trainer = trainers.UnigramTrainer(**common, **unknown)
    else:
        backend = tokenizers.Tokenizer(models.WordLevel(**unknown))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        if kind == "char":
            every = tokenizers.Regex("(?m:.)")
            backend.pre_tokenizer = pre_tokenizers.Split(every, "isolated")
            backend.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(**counted)
    if lower:
        backend.normalizer = normalizers.Sequence(lower)
    seen = _Seen(documents)
    backend.train_from_iterator(seen, trainer)
    if not seen.text:
        raise ValueError("documents hold no text to train a tokenizer on")
    backend.add_special_tokens(tokens)
    backend.add_special_tokens([f"<extra_id_{i}>" for i in range(sentinels)])
    if TEMPLATES[template]:
        pair = [(special[role], backend.token_to_id(special[role])) for role in ("bos", "eos")]
        backend.post_processor = processors.TemplateProcessing(
            single=TEMPLATES[template].format(**special), special_tokens=pair
        )
    return Tokenizer(backend, special)


class _Seen:
    """The documents, and whether any of them held text."""

    def __init__(self, documents: Iterable[str]):
        if isinstance(documents, str):
            raise ValueError("documents must be several texts, got one str: give [text]")
        self.documents, self.text = iter(documents), False

    def __iter__(self):
        return self

    def __next__(self) -> str:
        document = next(self.documents)
        self.text = self.text or bool(document.strip())
        return document


def remember_tokenizer(model, tokenizer: Tokenizer) -> None:
    """Let model.config, and with it the model's folder, know the tokenizer."""
    config = getattr(model, "config", None)
    if config is not None:
        if isinstance(source := getattr(config, "source", None), dict):
            source[FINGERPRINT] = tokenizer.fingerprint
        else:
            setattr(config, FINGERPRINT, tokenizer.fingerprint)


def check_tokenizer(model, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that is not the one the model was trained with.

    A model that remembers none is held to the size of its vocabulary alone.

    Raises:
        TokenizerMismatch: with the reason.
    """
    config = getattr(model, "config", None)
    known, size = getattr(config, FINGERPRINT, None), getattr(config, "vocab_size", None)
    if isinstance(source := getattr(config, "source", None), dict):
        known = source.get(FINGERPRINT)
    if isinstance(size, int) and tokenizer.vocab_size > size:
        raise TokenizerMismatch(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model's vocabulary {size}: "
            "it was trained with another tokenizer"
        )
    if known is not None and known != (given := tokenizer.fingerprint):
        raise TokenizerMismatch(
            f"the model was trained with the tokenizer {str(known)[:19]}..., and this one is "
            f"{given[:19]}...: the same text becomes other ids; load the tokenizer from the "
            "model's own folder"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names)))
