"""Training: tokenizers, objectives, and a small loop that can be stopped at any moment and goes on
bit for bit. `pip install fasttx[train]` brings what it needs; nothing is imported before use."""

import importlib

_WHERE = {
    "text": ("read_documents",),
    "tokenizer": ("Tokenizer", "TokenizerMismatch", "check_tokenizer", "train_tokenizer"),
    "stream": ("TokenStream",),
    "options": ("ConfigError", "TrainOptions"),
    "pairs": ("Pairs",),
    "labelled": ("AnswerSpans", "TextLabels", "WordLabels", "predict"),
    "batches": ("Rows",),
    "generation": ("generate_text",),
    "likelihood": ("log_likelihood", "zero_shot"),
    "run": ("train",),
    "loop": ("Result", "TrainingError", "fit"),
    "objectives": ("CausalLM", "Examples", "MaskedLM", "SpanCorruption", "TextInfilling"),
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_NAMES)


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__():
    return [*globals(), *__all__]
