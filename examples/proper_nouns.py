"""Proper nouns in the Brown corpus: MiniLM with a class for every word, its upper layers trained.

    python examples/proper_nouns.py --output runs/proper_nouns

A word is one where its tag begins with np (examples/brown.py). Every tenth text is held out. The
result is the F1 of these words. MiniLM's vocabulary has no capital letters, so that it must tell
Brown from brown by the sentence. Two baselines: the class a word had most often in the sentences
learned from, which sees no capitals either; and capitals themselves, of all words but a sentence's
first.
"""

import collections
import random
import sys

from brown import Sentence, Unavailable, documents, is_name, parted
from minilm import folder, load, options, tune

from fasttx.training import Tokenizer, WordLabels, predict

LENGTH = 96


def split(texts: dict, count: int, held_out: int) -> tuple[list[Sentence], list[Sentence]]:
    """Sentences drawn from the texts to learn from, and from the others."""
    parts = []
    for text, most in zip(parted(texts), (count, held_out), strict=True):
        sentences = [s for document in text for paragraph in document for s in paragraph]
        random.Random(0).shuffle(sentences)
        parts.append(sentences[:most])
    return tuple(parts)


def labels(sentences: list[Sentence]) -> list[list[int]]:
    return [[int(is_name(tag)) for _, tag in sentence] for sentence in sentences]


def examples(tokenizer: Tokenizer, sentences: list[Sentence]) -> WordLabels:
    words = [[word for word, _ in sentence] for sentence in sentences]
    return WordLabels(tokenizer, words, labels(sentences), LENGTH, cut=True)


def scores(guesses: list[list[bool]], right: list[list[int]]) -> dict[str, float]:
    """Precision, recall and F1 over all words."""
    pairs = [(bool(g), bool(r)) for row, known in zip(guesses, right, strict=True)
             for g, r in zip(row, known, strict=True)]  # fmt: skip
    hits = pairs.count((True, True))
    precision = hits / max(1, hits + pairs.count((True, False)))
    recall = hits / max(1, hits + pairs.count((False, True)))
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


def by_word(train: list[Sentence], test: list[Sentence]) -> list[list[bool]]:
    """The class each word had most often; words never seen are none."""
    counts = collections.Counter()
    for sentence in train:
        for word, tag in sentence:
            counts[word.lower()] += 1 if is_name(tag) else -1
    return [[counts[word.lower()] > 0 for word, _ in sentence] for sentence in test]


def by_capital(test: list[Sentence]) -> list[list[bool]]:
    return [[i > 0 and word[0].isupper() for i, (word, _) in enumerate(sentence)]
            for sentence in test]  # fmt: skip


def by_model(model, test: WordLabels) -> list[list[bool]]:
    """Words without a token, cut off, are guessed to be none."""
    found = []
    for logits, places in zip(predict(model, test), test.places, strict=True):
        chosen = logits.argmax(-1)
        found.append([bool(place >= 0 and chosen[place] == 1) for place in places])
    return found


def main(arguments: list[str] | None = None, texts: dict | None = None) -> dict:
    parser = options(
        __doc__, "runs/proper_nouns", layers=3, epochs=1, batch_size=32, learning_rate=2e-4
    )
    parser.add_argument("--sentences", type=int, default=6000)
    parser.add_argument("--held-out", type=int, default=2000, help="sentences")
    given = parser.parse_args(arguments)
    try:
        texts = documents() if texts is None else texts
        path = given.model or folder()
    except Unavailable as why:
        sys.exit(f"the corpus or the model cannot be had: {why}")
    train, test = split(texts, given.sentences, given.held_out)
    tokenizer = Tokenizer.load(path)
    model = load(path, "token_classification", trained=given.layers, num_labels=2)
    held, right = examples(tokenizer, test), labels(test)
    result, seconds = tune(model, examples(tokenizer, train), given.output, tokenizer, given)
    found = scores(by_model(model, held), right)
    found |= {"loss": result.loss, "seconds": seconds}
    found["words"] = scores(by_word(train, test), right)["f1"]
    found["capitals"] = scores(by_capital(test), right)["f1"]
    print(f"proper nouns of {len(test)} held-out sentences: F1 {found['f1']:.3f} (precision "
          f"{found['precision']:.3f}, recall {found['recall']:.3f}), {seconds:.0f} s of CPU; each "
          f"word's most frequent class {found['words']:.3f}, capitals {found['capitals']:.3f}"
          )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
