"""Classes of words: whether people feel a word to be good or bad, by MiniLM from its letters.

    python examples/word_classes.py --output runs/word_classes

The words come from VADER's lexicon (C. J. Hutto and E. Gilbert, 2014; MIT), each rated from -4 to 4
by ten people; those of letters alone. A tenth of all beginnings of four letters is held out with
all their words, so that no form of a held-out word is learned from. The result is the share of
held-out words on the right side of 0. The baselines are the more frequent side, and the votes of
the words that share the most letters at the end or the beginning.
"""

import random
import sys

import torch
from minilm import folder, load, options, tune
from packages import Unavailable, pypi_file

from fasttx.training import TextLabels, Tokenizer, predict

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311"
MEMBER = "vaderSentiment/vader_lexicon.txt"
CLASSES = ("bad", "good")


def lexicon() -> str:
    return pypi_file(PACKAGE, SHA256, MEMBER).read_text(encoding="utf-8")


def rated(lines: str) -> list[tuple[str, int]]:
    """(word, class) of lines of word, mean, deviation and ratings."""
    rows = (line.split("\t") for line in lines.splitlines())
    pairs = {word.lower(): float(mean) for word, mean, *_ in rows if word.isalpha()}
    return [(word, int(mean > 0)) for word, mean in sorted(pairs.items()) if mean]


def parted(pairs: list[tuple[str, int]], seed: int = 0) -> tuple[list, list]:
    """The words to learn from, shuffled, and a tenth of the beginnings held out."""
    rng = random.Random(seed)
    beginnings = sorted({word[:4] for word, _ in pairs})
    rng.shuffle(beginnings)
    held = set(beginnings[: max(1, len(beginnings) // 10)])
    both = [[p for p in pairs if (p[0][:4] in held) == side] for side in (False, True)]
    for part in both:
        rng.shuffle(part)
    return tuple(both)


def shared(a: str, b: str) -> int:
    """How many letters two words share at their ends, or at their beginnings."""
    best = 0
    for x, y in ((a, b), (a[::-1], b[::-1])):
        n = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q),
                 min(len(x), len(y)))  # fmt: skip
        best = max(best, n)
    return best


def by_letters(train: list[tuple[str, int]], test: list[tuple[str, int]]) -> float:
    right = 0
    for word, side in test:
        near = [(shared(word, other), other_side) for other, other_side in train]
        most = max(n for n, _ in near)
        votes = [s for n, s in near if n == most]
        right += (2 * sum(votes) > len(votes)) == bool(side)
    return right / len(test)


def main(arguments: list[str] | None = None, pairs: list[tuple[str, int]] | None = None) -> dict:
    parser = options(
        __doc__, "runs/word_classes", layers=6, epochs=3, batch_size=64, learning_rate=1e-4
    )
    given = parser.parse_args(arguments)
    try:
        pairs = rated(lexicon()) if pairs is None else pairs
        path = given.model or folder()
    except Unavailable as why:
        sys.exit(f"the words or the model cannot be had: {why}")
    train, test = parted(pairs)
    tokenizer = Tokenizer.load(path)
    model = load(path, "sequence_classification", trained=given.layers, num_labels=2)
    rows = TextLabels(tokenizer, *zip(*train, strict=True), 32)
    result, seconds = tune(model, rows, given.output, tokenizer, given)
    words, sides = zip(*test, strict=True)
    logits = torch.stack(predict(model, TextLabels(tokenizer, words, length=32)))
    chosen = logits.argmax(-1).tolist()
    right = sum(c == s for c, s in zip(chosen, sides, strict=True)) / len(test)
    for word, c, s in list(zip(words, chosen, sides, strict=True))[:5]:
        print(f"{word:>16}  {CLASSES[c]}" + ("" if c == s else f"  (is {CLASSES[s]})"))
    found = {"accuracy": right, "seconds": seconds, "loss": result.loss}
    frequent = int(2 * sum(s for _, s in train) > len(train))
    found["frequent"] = sides.count(frequent) / len(test)
    found["letters"] = by_letters(train, test)
    print(f"{right:.1%} of {len(test)} held-out words right, {seconds:.0f} s of CPU; the more "
          f"frequent side {found['frequent']:.1%}, the nearest words by letters "
          f"{found['letters']:.1%}")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
