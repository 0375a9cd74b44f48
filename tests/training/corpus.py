"""A made-up language: enough text to train on, the same in every run."""

import random

from fasttx.training import TokenStream, train_tokenizer

NOUNS = ["river", "stone", "bird", "lantern", "window", "garden", "unbelievableness"]
VERBS = ["keeps", "finds", "carries", "opens", "follows", "remembers", "paints"]


def documents(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(_sentence(draw) for _ in range(draw.randint(1, 6))) for _ in range(count)]


def _sentence(draw: random.Random) -> str:
    subject, thing = draw.sample(NOUNS, 2)
    return f"The {subject} {draw.choice(VERBS)} the {thing}, {draw.randint(1, 40)} times."


def tokenizer(kind: str = "bpe", size: int = 400, **options):
    return train_tokenizer(kind, documents(300), size, sentinels=40, **options)


def stream(tokenizer, count: int = 200, words: bool = False) -> TokenStream:
    return TokenStream.from_documents(tokenizer, documents(count, seed=1), words=words)
