"""Zero-shot classification: a language model that learned no task chooses the likeliest answer.

    python examples/king_james.py --output runs/king_james
    python examples/zero_shot.py --model runs/king_james/model
    python examples/zero_shot.py --model FOLDER --text "And she bare a" --answers " son" " stone"

Two tasks on the chapters that king_james.py holds out. "names": who is it about? Of ten names the
one that was struck out of a verse, by ln P(name and the rest of the verse | what stands before).
"continuations": which of four second halves belongs to a verse, by ln P(half | first half) -
ln P(half); the other three come from other held-out verses. Each beside two baselines: chance, and
for the names the most frequent one, for the halves the likeliest without the verse.
"""

import argparse
import random
import re
import sys

import torch
from king_james import LENGTH, Unavailable, chapters, parted

import fasttx
from fasttx.training import Tokenizer, zero_shot

NAMES = ("Aaron", "Abraham", "David", "Jacob", "Jesus", "Joseph", "Moses", "Paul", "Saul",
         "Solomon")  # fmt: skip


def names(verses: list[str]) -> tuple[list[str], list[list[str]], list[int]]:
    """(prompts, answers, which is right): the verses that hold one of NAMES, once."""
    pattern = re.compile(rf"\b({'|'.join(NAMES)})\b")
    prompts, answers, right = [], [], []
    for verse in verses:
        if len(found := list(pattern.finditer(verse))) == 1:
            before, after = verse[: found[0].start()], verse[found[0].end() :]
            space = " " if before.endswith(" ") else ""
            prompts.append(before.removesuffix(" "))
            answers.append([space + name + after for name in NAMES])
            right.append(NAMES.index(found[0][1]))
    return prompts, answers, right


def continuations(
    verses: list[str], choices: int = 4, seed: int = 0
) -> tuple[list[str], list[list[str]], list[int]]:
    """(prompts, answers, which is right): verses of 12 words or more, cut in two."""
    words = [verse.split() for verse in verses]
    halves = [(" ".join(w[: len(w) // 2]), " " + " ".join(w[len(w) // 2 :]))
              for w in words if len(w) >= 12]  # fmt: skip
    draw = random.Random(seed)
    prompts, answers, right = [], [], []
    for i, (before, after) in enumerate(halves):
        others = draw.sample([j for j in range(len(halves)) if j != i], choices - 1)
        given = [halves[j][1] for j in others]
        place = draw.randrange(choices)
        prompts.append(before)
        answers.append([*given[:place], after, *given[place:]])
        right.append(place)
    return prompts, answers, right


def accuracy(scores, right: list[int]) -> float:
    chosen = scores.argmax(1).tolist()
    return sum(c == r for c, r in zip(chosen, right, strict=True)) / len(right)


def measure(model, tokenizer, verses: list[str]) -> dict[str, float]:
    """The two tasks' accuracies and their baselines, printed."""
    prompts, answers, right = names(verses)
    scores = zero_shot(model, tokenizer, prompts, answers, length=LENGTH)
    found = {"names": accuracy(scores, right)}
    found["most frequent"] = max(map(right.count, right)) / len(right)
    print(f"names: {found['names']:.1%} of {len(right)} verses right; the most frequent name "
          f"{found['most frequent']:.1%}, chance {1 / len(NAMES):.1%}")  # fmt: skip
    prompts, answers, right = continuations(verses)
    alone = zero_shot(model, tokenizer, [""] * len(prompts), answers, length=LENGTH)
    scores = zero_shot(model, tokenizer, prompts, answers, length=LENGTH) - alone
    found["continuations"] = accuracy(scores, right)
    found["without the verse"] = accuracy(alone, right)
    print(f"continuations: {found['continuations']:.1%} of {len(right)} verses right; without the "
          f"verse {found['without the verse']:.1%}, chance {1 / len(answers[0]):.1%}")  # fmt: skip
    return found


def main(arguments: list[str] | None = None, documents: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/king_james/model")
    parser.add_argument("--text", help="a text of one's own, with --answers")
    parser.add_argument("--answers", nargs="+", help="each with the space that parts it from text")
    parser.add_argument("--normalize", default="none", help="none, tokens, characters or prior")
    given = parser.parse_args(arguments)
    if (given.text is None) != (given.answers is None):
        parser.error("--text and --answers go together")
    model = fasttx.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = Tokenizer.load(given.model)
    if given.text is not None:
        scores = zero_shot(model, tokenizer, [given.text], given.answers, normalize=given.normalize)
        found = dict(zip(given.answers, scores[0].softmax(0).tolist(), strict=True))
        for answer, share in sorted(found.items(), key=lambda pair: -pair[1]):
            print(f"{share:7.1%}  {given.text}{answer}")
        return found
    try:
        documents = chapters() if documents is None else documents
    except Unavailable as why:
        sys.exit(f"the text cannot be had: {why}")
    _, held = parted(documents)
    return measure(model, tokenizer, [verse for text in held for verse in text.split("\n")])


if __name__ == "__main__":
    main()
