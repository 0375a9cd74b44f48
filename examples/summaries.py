"""Summaries: a T5 of two and two layers learns to give a package its one-line synopsis.

    pip install rouge-score
    python examples/summaries.py --output runs/summaries

The texts are those of Debian's packages (see descriptions.py). A model this small cannot spell rare
names, so they are taken out and put back: words that are not among the most frequent become _0, _1,
... in the order in which they first occur in the body, and what the model writes of these is read
as the words they stand for. Packages with the same first sentence (a library, its headers, its
documentation) are all trained on or all held out, and one of each is asked for. The result is the
F1 of ROUGE-1, -2 and -L by rouge_score, beside the first sentence of the body and its first eight
words on the same packages. A run that was stopped goes on when it is started again.
"""

import argparse
import random
import re
import sys
from collections import Counter, defaultdict

from descriptions import Unavailable, descriptions
from seq2seq import trained, written

from fasttx.training import train_tokenizer

SIZES = {"d_model": 128, "d_kv": 16, "num_heads": 8, "d_ff": 512, "num_layers": 2,
         "dropout_rate": 0.1}  # fmt: skip
WORDS, HELD_OUT, NAMES = 1000, 1000, 48
FIRST, LAST = 40, 16
KINDS = ("rouge1", "rouge2", "rougeL")


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def first_sentence(paragraphs: list[str]) -> str:
    return re.match(r".+?(?:[.!?](?=\s+[A-Z(]|$)|$)", paragraphs[0])[0]


class Texts:
    """Bodies and synopses in the words of a tokenizer: what is not in `known` gets a number."""

    def __init__(self, known: set[str]):
        self.known = known | {"|"}

    def body(self, paragraphs: list[str]) -> tuple[str, list[str]]:
        """The first and last words of a body, and the words that _0, _1, ... stand for."""
        every, names, places = words(" ".join(paragraphs)), [], {}
        if len(every) > FIRST + LAST:
            every = [*every[:FIRST], "|", *every[-LAST:]]
        written = []
        for word in every:
            low = word.lower()
            if low not in self.known and low not in places and len(names) < NAMES:
                places[low] = f"_{len(names)}"
                names.append(word)
            written.append(places.get(low, low))
        return " ".join(written), names

    def synopsis(self, text: str, names: list[str]) -> str:
        """Without the words that are neither known nor in the body."""
        places = {name.lower(): f"_{i}" for i, name in enumerate(names)}
        given = (word.lower() for word in words(text))
        found = (places.get(word, word if word in self.known else None) for word in given)
        return " ".join(word for word in found if word)

    @staticmethod
    def read(written: str, names: list[str]) -> str:
        """What the model wrote, with the names in their places."""
        found = []
        for word in written.split():
            number = re.fullmatch(r"_(\d+)", word)
            if number is None:
                found.append(word)
            elif int(number[1]) < len(names):
                found.append(names[int(number[1])])
        return " ".join(found)


def packages(held_out: int = HELD_OUT) -> tuple[list, list]:
    """(held out, for training) of (paragraphs, synopsis)."""
    families = defaultdict(list)
    for synopsis, paragraphs in descriptions().values():
        if len(words(synopsis)) > 1 and len(words(" ".join(paragraphs))) > 7:
            families[first_sentence(paragraphs).lower()].append((paragraphs, synopsis))
    chosen = sorted(families)
    random.Random(0).shuffle(chosen)
    held = [families[name][0] for name in chosen[:held_out]]
    return held, [pair for name in chosen[held_out:] for pair in families[name]]


def scores(answers: list[str], wanted: list[str]) -> dict[str, float]:
    """The mean F1 by kind of ROUGE."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, total = RougeScorer(KINDS), Counter()
    for answer, text in zip(answers, wanted, strict=True):
        for kind, found in scorer.score(text, answer).items():
            total[kind] += found.fmeasure / len(wanted)
    return {kind: total[kind] for kind in KINDS}


def main(arguments: list[str] | None = None, split: tuple[list, list] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/summaries")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args(arguments)
    try:
        import rouge_score  # noqa: F401

        held, rest = packages() if split is None else split
    except ModuleNotFoundError:
        sys.exit("rouge-score is not installed: pip install rouge-score")
    except Unavailable as why:
        sys.exit(f"the texts cannot be had: {why}")
    counted = Counter(w.lower() for p, s in rest for w in words(" ".join(p)) + words(s))
    known = {w for w, _ in counted.most_common(WORDS) if not w.startswith("_")}
    texts = Texts(known)
    numbers = [f"_{i}" for i in range(NAMES)]
    tokenizer = train_tokenizer("word", [" ".join([*sorted(texts.known), *numbers])],
                                WORDS + NAMES + 10, min_frequency=1, template="eos")  # fmt: skip

    def pairs(some):
        bodies = [texts.body(p) for p, _ in some]
        targets = [texts.synopsis(s, n) for (_, s), (_, n) in zip(some, bodies, strict=True)]
        return [(body, t) for (body, _), t in zip(bodies, targets, strict=True) if t]

    model, result, seconds = trained(
        "t5", SIZES, tokenizer, pairs(rest), pairs(held), given,
        lengths=(64, 20), learning_rate=3e-3, evaluate_every=1000,
    )  # fmt: skip
    bodies = [texts.body(p) for p, _ in held]
    said = written(
        model, tokenizer, [text for text, _ in bodies], 200, max_new_tokens=20, num_beams=4
    )
    sentences = [first_sentence(p) for p, _ in held]
    answers = {
        "first sentence": sentences,
        "first words": [" ".join(s.split()[:8]) for s in sentences],
        "model": [texts.read(w, names) for w, (_, names) in zip(said, bodies, strict=True)],
    }
    wanted = [s for _, s in held]
    found = {name: scores(a, wanted) for name, a in answers.items()}
    for i in range(min(5, len(held))):
        print(f"  {sentences[i][:90]}\n    {answers['model'][i]}\n    (is {wanted[i]})")
    for name, score in found.items():
        print(f"{name:>16}  " + "  ".join(f"{k} {v:.3f}" for k, v in score.items()))
    print(f"on {len(held)} held-out packages; {result.steps} steps, {seconds:.0f} s of CPU time, "
          f"evaluation loss {result.evaluation_loss:.4f}")  # fmt: skip
    return {"rouge": found, "seconds": seconds, "loss": result.evaluation_loss}


if __name__ == "__main__":
    main()
