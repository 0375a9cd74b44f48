"""Answers in a passage: MiniLM finds who did what in passages of the Brown corpus.

    python examples/answers.py --output runs/answers

Made of the corpus's tags (examples/brown.py): where a clause begins with a name and a verb, "who",
the verb and what follows up to the next punctuation is a question, the name its answer, the
sentence and others around it, 90 words or more, the passage: "who awaited William at the officers'
club ?". The words of a question stand in its passage, so that this asks for finding and for cutting
out, not for knowledge. With --apart the passage lacks the sentence: the name must be told from what
else is said of it. Every tenth text is held out; of these, passages of three different names or
more are asked about. The result is the share of answers that are exactly right, and the F1 of their
words; the baselines are a random span of at most four words, a random name of the passage, its
first and its most frequent name, and the place (first and last word) most often right in training.
"""

import collections
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from brown import Sentence, Unavailable, documents, is_name, parted
from minilm import folder, load, options, tune

from fasttx.training import AnswerSpans, Tokenizer, predict

VERBS = {"vbd", "vbz", "bedz", "bez", "hvd", "hvz", "md", "dod", "doz"}
BEFORE = {".", ",", ":", "--", "``", "cc", "cs", "wrb"}
STOPS = {".", ",", ":", "--", "``", "''", "(", ")"}
NAMES = 3
LENGTH = 224


@dataclass(frozen=True)
class Question:
    """words: of the passage; names: (first, end) of all in it; answer: one of them."""

    text: str
    words: tuple[str, ...]
    names: tuple[tuple[int, int], ...]
    answer: tuple[int, int]

    @property
    def passage(self) -> str:
        return " ".join(self.words)

    @property
    def span(self) -> tuple[int, int]:
        """The answer's characters."""
        first, end = self.answer
        start = len(" ".join([*self.words[:first], ""]))
        return start, start + len(self.words_of(self.answer))

    def words_of(self, place: tuple[int, int]) -> str:
        return " ".join(self.words[place[0] : place[1]])


def names(sentence: Sentence) -> list[tuple[int, int]]:
    """Runs of proper nouns that own nothing: (first, end)."""
    found, start = [], None
    for i, (_, tag) in enumerate([*sentence, ("", "")]):
        inside = is_name(tag) and "$" not in tag and "+" not in tag
        if inside and start is None:
            start = i
        elif not inside and start is not None:
            found.append((start, i))
            start = None
    return found


def asked(sentence: Sentence) -> Iterator[tuple[str, tuple[int, int]]]:
    """(question, name): of each clause that begins with a name and a verb."""
    for first, end in names(sentence):
        alone = first == 0 or sentence[first - 1][1].split("-")[0] in BEFORE
        letters = sum(len(word) for word, _ in sentence[first:end])
        if not alone or letters < 3 or end == len(sentence):
            continue
        if sentence[end][1].split("-")[0] not in VERBS:
            continue
        rest = []
        for word, tag in sentence[end : end + 12]:
            if tag.split("-")[0] in STOPS:
                break
            rest.append(word)
        if len(rest) >= 3:
            yield " ".join(["who", *rest, "?"]), (first, end)


def questions(
    texts: list, least: int = 1, *, passage: int = 90, apart: bool = False, seed: int = 0
) -> list[Question]:
    """All that can be asked, with passages of `passage` words or more drawn around their sentences,
    shuffled. least: different names in a passage. apart: the passage lacks the sentence that was
    asked about, and the answer is the nearest other mention of the name, where there is one."""
    rng, found = random.Random(seed), []
    for document in texts:
        sentences = [sentence for paragraph in document for sentence in paragraph]
        for i, sentence in enumerate(sentences):
            for text, (first, end) in asked(sentence):
                low, high = _around(sentences, i, passage, rng)
                before = sum(map(len, sentences[low:i]))
                around = [s for j, s in enumerate(sentences[low:high], low) if j != i or not apart]
                whole = [pair for s in around for pair in s]
                words = tuple('"' if word in ("``", "''") else word for word, _ in whole)
                runs = tuple(names(whole))
                answer = (before + first, before + end)
                if apart:
                    name = [word for word, _ in sentence[first:end]]
                    same = [run for run in runs if list(words[run[0] : run[1]]) == name]
                    answer = min(same, key=lambda run: abs(run[0] - before), default=None)
                if answer in runs and len({words[a:b] for a, b in runs}) >= least:
                    found.append(Question(text, words, runs, answer))
    rng.shuffle(found)
    return found


def _around(sentences: list[Sentence], at: int, least: int, rng: random.Random) -> tuple[int, int]:
    """(low, high): sentence `at` and neighbours on sides that are drawn, `least` words or more."""
    low, high = at, at + 1
    while sum(map(len, sentences[low:high])) < least and (low > 0 or high < len(sentences)):
        if high == len(sentences) or (low > 0 and rng.random() < 0.5):
            low -= 1
        else:
            high += 1
    return low, high


def examples(tokenizer: Tokenizer, given: list[Question]) -> AnswerSpans:
    """Those whose passage is short enough; the others are refused."""
    return AnswerSpans(
        tokenizer,
        [q.text for q in given],
        [q.passage for q in given],
        [q.span for q in given],
        LENGTH,
    )


def short(tokenizer: Tokenizer, given: list[Question]) -> list[Question]:
    encodings = tokenizer.encode_inputs([(q.text, q.passage) for q in given])
    return [q for q, e in zip(given, encodings, strict=True) if len(e.ids) <= LENGTH]


def f1(guess: str, right: str) -> float:
    a, b = (collections.Counter(text.lower().split()) for text in (guess, right))
    both = sum((a & b).values())
    return 2 * both / (sum(a.values()) + sum(b.values()))


def scores(guesses: list[str], right: list[Question]) -> dict[str, float]:
    pairs = [(g, q.words_of(q.answer)) for g, q in zip(guesses, right, strict=True)]
    exact = sum(g.lower() == r.lower() for g, r in pairs) / len(pairs)
    return {"exact": exact, "f1": sum(f1(g, r) for g, r in pairs) / len(pairs)}


def baselines(train: list[Question], test: list[Question], seed: int = 0) -> dict[str, dict]:
    rng = random.Random(seed)
    place = collections.Counter(q.answer for q in train).most_common(1)[0][0]

    def span(q: Question) -> str:
        first = rng.randrange(len(q.words))
        return q.words_of((first, first + rng.randint(1, 4)))

    def frequent(q: Question) -> str:
        return collections.Counter(map(q.words_of, q.names)).most_common(1)[0][0]

    rules = {
        "random span": span,
        "commonest place": lambda q: q.words_of(place),
        "random name": lambda q: q.words_of(rng.choice(q.names)),
        "first name": lambda q: q.words_of(q.names[0]),
        "most frequent name": frequent,
    }
    return {name: scores([rule(q) for q in test], test) for name, rule in rules.items()}


def by_model(model, test: AnswerSpans) -> list[str]:
    spans = [test.answer(i, logits) for i, logits in enumerate(predict(model, test))]
    return [p[first:end] for p, (first, end) in zip(test.passages, spans, strict=True)]


def main(arguments: list[str] | None = None, texts: dict | None = None) -> dict:
    parser = options(__doc__, "runs/answers", layers=6, epochs=2, batch_size=16, learning_rate=2e-4)
    parser.add_argument("--passage", type=int, default=90, help="words, or more")
    parser.add_argument("--apart", action="store_true", help="passages without the sentence asked")
    given = parser.parse_args(arguments)
    try:
        texts = documents() if texts is None else texts
        path = given.model or folder()
    except Unavailable as why:
        sys.exit(f"the corpus or the model cannot be had: {why}")
    tokenizer = Tokenizer.load(path)
    train, test = (
        short(tokenizer, questions(part, least, passage=given.passage, apart=given.apart))
        for part, least in zip(parted(texts), (1, NAMES), strict=True)
    )
    model = load(path, "question_answering", trained=given.layers)
    result, seconds = tune(model, examples(tokenizer, train), given.output, tokenizer, given)
    guesses = by_model(model, examples(tokenizer, test))
    found = {"model": scores(guesses, test), **baselines(train, test)}
    for q, guess in list(zip(test, guesses, strict=True))[:5]:
        right = q.words_of(q.answer)
        print(f"{q.text}  {guess}" + ("" if guess == right else f"  (is {right})"))
    print(f"{len(train)} questions learned from, {len(test)} held out, {seconds:.0f} s of CPU")
    for name, score in found.items():
        print(f"{name:>20}: {score['exact']:6.1%} exactly right, F1 {score['f1']:.3f}")
    return found | {"seconds": seconds, "loss": result.loss}


if __name__ == "__main__":
    main()
